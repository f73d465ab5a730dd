"""The arrays that a rank's kernel works on (kernel/state.py): of which sizes, and in which memory."""

from __future__ import annotations

import numpy as np

from reference import Hosts, Layout, MoEConfig
from reference.sizes import hidden_rows, max_tasks, ring_bytes

from ..kernel.queue import COUNTER_STRIDE, NUM_COUNTERS, TASK_WORDS
from ..kernel.row_tiles import STREAM_WORDS, TILE_WORDS
from ..kernel.state import Queue, Received, Segments, Tokens
from ..kernel.trace import EVENT_WORDS
from ..tile_gemm import PLACE_WORDS
from .protocols import Memory
from .rules import num_factors, num_values


def make_segments(
    config: MoEConfig, rank_idx: int, segments: list[np.ndarray], memory: Memory, save: str | None, hosts: Hosts
) -> Segments:
    """Views of this rank's segment, whose flags are cleared, and a ring for its puts.

    Args:
        segments: every rank's, as bytes.
    """
    own, layout = segments[rank_idx], Layout(config, save, not hosts.is_one)
    element, sums = config.format.storage, config.accumulator

    def words(numbers: list[int]) -> np.ndarray:
        return memory.array(np.array(numbers, np.int64))

    def view(offset: int, num_elements: int, dtype: np.dtype) -> np.ndarray:
        return own[offset : offset + num_elements * dtype.itemsize].view(dtype)

    word, remote = np.dtype(np.int64), [hosts.are_apart(rank_idx, peer) for peer in range(config.num_ranks)]
    address = [memory.address(segment) for segment in segments]
    stage = address[rank_idx] + layout.stage
    own[layout.dispatch_flag :] = 0  # MPI promises no zeroed memory; peers write only after all ranks are ready
    return Segments(
        address=words(address),
        room=words([stage if apart else there for apart, there in zip(remote, address, strict=True)]),
        remote=words([int(apart) for apart in remote]),
        wire=memory.make_wire(ring_bytes(config, hosts, save) // 8, own, layout, rank_idx),
        dispatch=view(layout.dispatch, layout.region_elements, element),
        result=view(layout.result, layout.region_elements, element),
        dispatch_flag=view(layout.dispatch_flag, layout.num_dispatch_flags, word),
        result_flag=view(layout.result_flag, layout.num_result_flags, word),
        control=view(layout.control, (layout.num_bytes - layout.control) // 8, word),
        again=view(layout.again, layout.again_elements, element),
        factors=view(layout.factors, layout.factor_elements, sums),
        dots=view(layout.dots, layout.factor_elements, sums),
    )


def make_tokens(config: MoEConfig, memory: Memory) -> Tokens:
    """Room for what becomes of this rank's tokens in one call, but for the tokens themselves: see `Memory.adopt`."""
    c = config
    pairs, blocks = c.num_tokens * c.num_topk, -(-c.num_tokens // c.token_block)
    empty = memory.empty(0, c.format.storage)
    shared_rows, shared_tiles = (c.num_tokens, -(-c.num_tokens // c.tile_m)) if c.shared_ffn else (0, 0)

    def integers(size: int) -> np.ndarray:
        return memory.zeros(size, np.int32)

    return Tokens(
        x=empty,
        y=empty,
        logits=memory.empty(c.num_tokens * c.num_choices, c.accumulator),
        kept_logits=memory.empty(0, c.accumulator),
        kept_results=empty,
        values=memory.empty(num_values(c), c.accumulator),
        topk_idx=integers(pairs),
        topk_weights=memory.zeros(pairs, c.accumulator),
        factors=memory.empty(num_factors(c), c.accumulator),
        place=integers(pairs),
        order=integers(pairs),
        counts=integers(blocks * c.num_experts),
        starts=integers(blocks * c.num_experts),
        bases=integers(blocks * c.num_experts),
        sent=integers(c.num_experts),
        results_left=integers(c.num_experts),
        needs_left=memory.zeros(blocks, np.int64),
        result_seen=memory.zeros(c.num_experts * Layout(c).row_blocks, np.int64),
        shared_ups=empty,
        shared_hidden=memory.empty(shared_rows * c.shared_ffn, c.format.storage),
        shared_results=memory.empty(shared_rows * c.hidden, c.format.storage),
        shared_factors=memory.array(np.ones(shared_rows, c.accumulator)),
        shared_up_done=memory.zeros(shared_tiles, np.int64),
        shared_down_done=memory.zeros(shared_tiles, np.int64),
    )


def make_received(config: MoEConfig, memory: Memory) -> Received:
    """Room for what one call brings to this rank's experts, and for their hidden rows."""
    c, row_blocks = config, Layout(config).row_blocks
    element = c.format.storage

    def words(size: int) -> np.ndarray:
        return memory.zeros(size, np.int64)

    return Received(
        seen=words(c.num_experts),
        rows=words(c.num_experts),
        first=words(c.num_experts),
        begun=words(c.num_experts),
        streams=words(c.num_experts_per_rank * STREAM_WORDS),
        arrived=words(c.num_experts),
        cut=words(c.num_experts * row_blocks),
        tiles=words(c.num_experts * row_blocks * TILE_WORDS),
        places=memory.empty(hidden_rows(c) * PLACE_WORDS, np.dtype(np.int64)),
        up_done=words(c.num_experts * row_blocks),
        down_done=words(c.num_experts * row_blocks),
        chunk_done=words(c.num_experts * row_blocks),
        hidden=memory.empty(hidden_rows(c) * c.ffn, element),
        kept_rows=memory.empty(0, element),
        kept_ups=memory.empty(0, element),
        weights_left=words(c.num_experts_per_rank),
    )


def make_queue(config: MoEConfig, memory: Memory, more_tasks: int = 0) -> Queue:
    """A rank's queue, with room for so many tasks more than a forward has."""
    return Queue(
        memory.zeros((max_tasks(config) + more_tasks) * TASK_WORDS, np.int64),
        memory.zeros(2 * NUM_COUNTERS * COUNTER_STRIDE, np.int64),
    )


def make_traces(num_blocks: int, num_events: int, memory: Memory) -> np.ndarray:
    """Room for so many events of each block; none, where there are to be no events."""
    words = (num_events + 1) * EVENT_WORDS if num_events else 0
    return memory.zeros(num_blocks * words, np.int64)
