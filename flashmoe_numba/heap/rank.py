"""One rank's side of a layer: its arrays for the kernel, made once, and the arguments of one call.

Knows the kernel's state groups and the layout; knows neither threads nor processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from reference import Layout, MoEConfig, Routing, Weights
from reference.arrays import Array
from reference.plan import hidden_rows, max_tasks
from reference.runs import RowTile
from reference.tiles import shared_row_tiles

from ..kernel.grid import RankArguments
from ..kernel.queue import COUNTER_STRIDE, NUM_COUNTERS, TASK_WORDS
from ..kernel.row_tiles import STREAM_WORDS, TILE_WORDS
from ..kernel.state import Experts, Problem, Queue, Received, Segments, Tokens
from ..kernel.trace import EVENT_WORDS
from ..processes.ownership import Owned
from ..tile_gemm import PLACE_WORDS
from .cut import read_tiles
from .protocols import Memory
from .rules import fill_kinds, make_kinds, num_factors, num_values


@dataclass(frozen=True)
class Stats:
    """Counters of one rank's last call.

    `padded_rows` is what the row tiles add up to, each as tall as the lowest height that holds its rows;
    `padded_row_share` the part of them that holds no row. Packed by sources, both depend on what came when.
    `rows_per_expert` are the received rows of each of this rank's experts. `dropped_pairs` chose an expert and were not
    sent, because of the capacity. `zero_choices` are pairs that chose a zero-computation expert: nothing is sent for
    them. `shared_tiles` are the row tiles of the shared expert, of this rank's own tokens.

    What is not finite: `nonfinite_tokens` have routing weights that hold an infinity or NaN, because x did or because a
    logit left the range of the accumulator (or as they were given); `nonfinite_rows` are those of the sent rows whose
    result holds one, for the same x, or because it or the hidden row left the range of the element type. (What leaves
    it only when a token's results are added up is in y alone.) Counting them reads all results of the call.
    """

    epoch: int
    num_tokens: int
    sent_rows: int
    received_rows: int
    rows_per_expert: tuple[int, ...]
    dropped_pairs: int
    row_tiles: int
    padded_rows: int
    zero_choices: int
    shared_tiles: int
    nonfinite_tokens: int
    nonfinite_rows: int

    @property
    def padded_row_share(self) -> float:
        return 1 - self.received_rows / self.padded_rows if self.padded_rows else 0.0


def _num_nonfinite(rows: np.ndarray) -> int:
    """Rows of `[rows, columns]` that hold an infinity or NaN."""
    return int((~np.isfinite(rows)).any(axis=1).sum())


class Rank(Owned):
    """Arrays of one rank.

    Args:
        weights: the experts of this rank only.
        segments: every rank's segment as bytes, as seen from this process.
        trace_events: events to keep per block and call, 0 for none.
        packed: may a row tile hold rows of several sources?
    """

    def __init__(
        self,
        config: MoEConfig,
        rank_idx: int,
        weights: Weights,
        segments: list[np.ndarray],
        num_processors: int,
        memory: Memory,
        trace_events: int,
        packed: bool = True,
    ) -> None:
        self.packed = packed
        self.config, self.rank_idx, self.num_processors, self._memory = config, rank_idx, num_processors, memory
        self.layout = Layout(config)
        self.segments = self._segments(segments)
        self.received = self._received()
        self.tokens = self._token_arrays()
        self._kinds = make_kinds(config)
        self.experts = self.pack(weights)
        self.queue = Queue(
            memory.zeros(max_tasks(config) * TASK_WORDS, np.int64),
            memory.zeros(2 * NUM_COUNTERS * COUNTER_STRIDE, np.int64),
        )
        trace_words = (trace_events + 1) * EVENT_WORDS if trace_events else 0
        self.traces = memory.zeros((num_processors + 1) * trace_words, np.int64)
        self.left = memory.zeros(1, np.int64)
        self.problem = self._fixed_problem()

    @property
    def control(self) -> np.ndarray:
        return self.segments.control

    def call(
        self,
        x: Any,
        routing: Routing | None,
        epoch: int,
        deadline_ns: int,
        topk_idx: Array | None = None,
        logits: Array | None = None,
        experts: Experts | None = None,
    ) -> tuple[Any, RankArguments]:
        """(y, what the blocks of this call are given): y is filled once all have run.

        Args:
            x: `[num_tokens, hidden]`, as `check_tokens` of the memory returns it.
            routing: one from outside, or None.
            topk_idx: `[num_tokens, num_topk]` from outside, -1 for no choice: for a router with choice "given".
            logits: `[num_tokens, num_choices]` from outside, for the router.
            experts: weights that `pack` returned, or None for the rank's own.
        """
        x_storage, y_storage, y = self._memory.adopt(x)
        tokens = self.tokens._replace(x=x_storage, y=y_storage)
        if routing is not None:
            self._store(tokens.topk_idx, routing.topk_idx)
            self._store(tokens.topk_weights, routing.topk_weights)
        if topk_idx is not None:
            self._store(tokens.topk_idx, topk_idx)
        if logits is not None:
            self._store(tokens.logits, logits)
        if self.config.shared_ffn:
            self._memory.aim((experts or self.experts).shared_up, x_storage)
        given = dict(routed=routing is not None, has_logits=logits is not None)
        problem = self.problem._replace(epoch=epoch, num_tokens=len(x), deadline_ns=deadline_ns, **given)
        return y, self._arguments(problem, tokens, experts)

    def _store(self, target: Array, values: Array) -> None:
        self._memory.store(target[: values.size], values.reshape(-1))

    def first_arguments(self) -> RankArguments:
        """What blocks are given before any call, with tokens of size 0."""
        return self._arguments(self.problem, self.tokens)

    def _arguments(self, problem: Problem, tokens: Tokens, experts: Experts | None = None) -> RankArguments:
        groups = problem, self.segments, experts or self.experts, tokens, self.received, self.queue
        return RankArguments(*groups, traces=self.traces, left=self.left)

    def leaving(self, epoch: int) -> tuple[Problem, Segments]:
        """Arguments of `kernel.leave`."""
        return self.problem._replace(epoch=epoch), self.segments

    def routing(self, num_tokens: int) -> Routing:
        """A copy of the last call's routing."""
        shape = (num_tokens, self.config.num_topk)
        size = num_tokens * self.config.num_topk
        parts = self.tokens.topk_idx[:size], self.tokens.topk_weights[:size]
        return Routing(*(self._memory.to_host(part).reshape(shape) for part in parts))

    def stats(self, epoch: int, num_tokens: int) -> Stats:
        c = self.config
        seen, rows, sent = map(self._memory.to_host, (self.received.seen, self.received.rows, self.tokens.sent))
        received, routing = np.where(seen == epoch, rows, 0), self.routing(num_tokens)
        tiles = [tile for of_expert in self.row_tiles(epoch) for tile in of_expert]
        zero = routing.topk_idx >= c.num_experts
        return Stats(
            epoch=epoch,
            num_tokens=num_tokens,
            sent_rows=int(sent.sum()),
            received_rows=int(received.sum()),
            rows_per_expert=tuple(received.reshape(c.num_ranks, -1).sum(axis=0).tolist()),
            dropped_pairs=int((routing.topk_idx >= 0).sum() - zero.sum() - sent.sum()),
            row_tiles=len(tiles),
            padded_rows=sum(tile.height for tile in tiles),
            zero_choices=int(zero.sum()),
            shared_tiles=len(shared_row_tiles(num_tokens, c)),
            nonfinite_tokens=_num_nonfinite(routing.topk_weights),
            nonfinite_rows=sum(_num_nonfinite(self._results(e, num_rows)) for e, num_rows in enumerate(sent.tolist())),
        )

    def row_tiles(self, epoch: int) -> list[list[RowTile]]:
        """Of each of this rank's experts in the last call."""
        return read_tiles(self.received, epoch, self.config, self._memory.to_host)

    def _results(self, expert: int, num_rows: int) -> np.ndarray:
        """`[num_rows, hidden]`: a copy of what came back for the rows sent to this expert, whose slots come first."""
        c = self.config
        first = expert * c.slots * c.hidden
        rows = self._memory.to_host(self.segments.result[first : first + num_rows * c.hidden])
        return rows.view(c.numpy_dtype).reshape(num_rows, c.hidden)

    def _segments(self, segments: list[np.ndarray]) -> Segments:
        own, layout = segments[self.rank_idx], self.layout
        element = self.config.format.storage

        def view(offset: int, num_elements: int, dtype: np.dtype) -> np.ndarray:
            return own[offset : offset + num_elements * dtype.itemsize].view(dtype)

        word = np.dtype(np.int64)
        own[layout.dispatch_flag :] = (
            0  # MPI does not promise zeroed memory; peers write only after all ranks are ready
        )
        return Segments(
            address=self._words([self._memory.address(segment) for segment in segments]),
            dispatch=view(layout.dispatch, layout.region_elements, element),
            result=view(layout.result, layout.region_elements, element),
            dispatch_flag=view(layout.dispatch_flag, layout.num_dispatch_flags, word),
            result_flag=view(layout.result_flag, layout.num_result_flags, word),
            control=view(layout.control, (layout.num_bytes - layout.control) // 8, word),
        )

    def pack(self, weights: Weights, into: Experts | None = None) -> Experts:
        """Weights in the form of the backend's tile GEMM, told which rows they will multiply where these stay put.

        Args:
            weights: the experts of this rank only.
            into: what this returned for other weights, to be filled anew; None: take memory.
        """
        dispatch, tokens = self.segments.dispatch, self.tokens
        router = self._factors(weights.router, into and into.router)
        up, down = self._pack(weights, dispatch, self.received.hidden, into and (into.up, into.down))
        shared_up, shared_down, shared_gate = up, down, router
        if weights.shared is not None:  # its rows lie elsewhere in each call: `aim`
            old = into and (into.shared_up, into.shared_down)
            shared_up, shared_down = self._pack(weights.shared, dispatch, tokens.shared_hidden, old)
        if weights.shared_gate_weight is not None:
            shared_gate = self._factors(weights.shared_gate_weight[None], into and into.shared_gate)
        return Experts(
            router=router,
            up=up,
            down=down,
            shared_up=shared_up,
            shared_down=shared_down,
            shared_gate=shared_gate,
            **fill_kinds(self._kinds, weights, self._memory, into)._asdict(),
        )

    def _pack(self, weights: Weights, rows: Any, hidden: Any, into: tuple[Any, Any] | None) -> tuple[Any, Any]:
        """(up, down) of these experts, and what they multiply."""
        c, pack = self.config, self._memory.pack
        old_up, old_down = into or (None, None)
        ups, up_biases = zip(*weights.ups, strict=True)
        up = pack(ups, up_biases, c.tile_ffn, c.accumulator, rows, old_up)
        return up, pack([weights.down_proj], [weights.down_bias], c.tile_n, c.accumulator, hidden, old_down)

    def _factors(self, matrix: np.ndarray, into: Any) -> Any:
        """A matrix whose products stay in the accumulator's type."""
        c = self.config
        return self._memory.pack([matrix.astype(c.accumulator)[None]], [None], c.tile_n, c.accumulator, None, into)

    def unpack(self, experts: Experts, weights: Weights) -> None:
        """The matrices of what `pack` returned, but for the router, written into those of `weights`."""
        self._memory.unpack(experts.up, [matrix for matrix, _ in weights.ups])
        self._memory.unpack(experts.down, [weights.down_proj])
        if weights.shared is not None:
            self._memory.unpack(experts.shared_up, [matrix for matrix, _ in weights.shared.ups])
            self._memory.unpack(experts.shared_down, [weights.shared.down_proj])

    def _words(self, values: list[int]) -> np.ndarray:
        return self._memory.array(np.array(values, np.int64))

    def _received(self) -> Received:
        c, row_blocks = self.config, self.layout.row_blocks
        element = c.format.storage

        def words(size: int) -> np.ndarray:
            return self._memory.zeros(size, np.int64)

        return Received(
            seen=words(c.num_experts),
            rows=words(c.num_experts),
            begun=words(c.num_experts),
            streams=words(c.num_experts_per_rank * STREAM_WORDS),
            arrived=words(c.num_experts),
            cut=words(c.num_experts * row_blocks),
            tiles=words(c.num_experts * row_blocks * TILE_WORDS),
            places=self._memory.empty(hidden_rows(c) * PLACE_WORDS, np.dtype(np.int64)),
            up_done=words(c.num_experts * row_blocks),
            down_done=words(c.num_experts * row_blocks),
            chunk_done=words(c.num_experts * row_blocks),
            hidden=self._memory.empty(hidden_rows(c) * c.ffn, element),
        )

    def _token_arrays(self) -> Tokens:
        c = self.config
        pairs, blocks = c.num_tokens * c.num_topk, -(-c.num_tokens // c.token_block)
        memory = self._memory
        empty = memory.empty(0, c.format.storage)
        shared_rows, shared_tiles = (c.num_tokens, -(-c.num_tokens // c.tile_m)) if c.shared_ffn else (0, 0)

        def integers(size: int) -> np.ndarray:
            return memory.zeros(size, np.int32)

        return Tokens(
            x=empty,
            y=empty,
            logits=memory.empty(c.num_tokens * c.num_choices, c.accumulator),
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
            result_seen=memory.zeros(c.num_experts * self.layout.row_blocks, np.int64),
            shared_hidden=memory.empty(shared_rows * c.shared_ffn, c.format.storage),
            shared_results=memory.empty(shared_rows * c.hidden, c.format.storage),
            shared_factors=memory.array(np.ones(shared_rows, c.accumulator)),
            shared_up_done=memory.zeros(shared_tiles, np.int64),
            shared_down_done=memory.zeros(shared_tiles, np.int64),
        )

    def _fixed_problem(self) -> Problem:
        c, layout = self.config, self.layout
        return Problem(
            epoch=0,
            rank_idx=self.rank_idx,
            num_ranks=c.num_ranks,
            num_processors=self.num_processors,
            num_tokens=0,
            hidden=c.hidden,
            ffn=c.ffn,
            shared_ffn=c.shared_ffn,
            num_experts=c.num_experts,
            num_choices=c.num_choices,
            experts_per_rank=c.num_experts_per_rank,
            num_topk=c.num_topk,
            slots=c.slots,
            row_blocks=layout.row_blocks,
            tile_m_min=c.tile_m_min,
            tile_m=c.tile_m,
            tile_ffn=min(c.tile_ffn, c.ffn),
            tile_hidden=min(c.tile_n, c.hidden),
            tile_shared=min(c.tile_ffn, max(c.shared_ffn, 1)),
            tile_experts=min(c.tile_n, c.num_choices),
            token_block=c.token_block,
            weight_input=c.router_kind.weight_input,
            routed=False,
            shared_gate=c.shared_gate,
            adds_input=c.num_zero > 0 and c.zero == "identity",
            has_logits=False,
            dispatch_at=layout.dispatch,
            result_at=layout.result,
            dispatch_flag_at=layout.dispatch_flag,
            result_flag_at=layout.result_flag,
            control_at=layout.control,
            deadline_ns=0,
            packed=self.packed,
        )
