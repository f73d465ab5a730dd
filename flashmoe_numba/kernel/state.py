"""What a block of the persistent kernel works on: named groups of run-time sizes and of arrays.

Sizes are arguments, not compiled-in constants, so a new model shape needs no new kernel. Arrays are one-dimensional. A
*pair* is one (token, choice) of this rank, numbered `token * num_topk + choice`. A *packet* is what one source sends to
one expert of this rank, numbered `source * experts_per_rank + expert`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flashmoe_numba.tile_gemm import Form

from .rules import ResultNorm, RouterRule

# words of a block's box, which its lanes share
PLACE = 0  # the place of the task to run, or -1
IS_LAST = 1  # did this block finish the last of the tasks that the next ones wait for?
BOX_WORDS = 8


class Problem(NamedTuple):
    """Integers that all blocks of a rank see alike in one call."""

    epoch: int
    call: int  # what kind of call this is, as packets tell it (signals.py); not 0: a backward
    keeps: bool  # a forward whose rows, products and logits are kept for a backward, where there is room for them
    recomputes: bool  # a backward without the up-products
    resends: bool  # a backward without the rows
    fresh: bool  # a backward that begins its gradients of matrices, whatever there is where they lie
    weight_tasks: int  # of a backward: of each expert that has rows, for the gradients of its weights
    router_weight_tasks: int  # of a backward, for the gradients of the router
    shared_weight_tasks: int  # likewise of the shared expert
    norm_weight_tasks: int  # likewise of the norm of experts' results
    rank_idx: int
    num_ranks: int
    num_processors: int
    num_tokens: int  # of this rank in this call
    hidden: int
    ffn: int
    parts: int  # up matrices of an expert
    shared_ffn: int  # 0: no shared expert
    shared_parts: int
    num_experts: int
    num_choices: int  # experts, then zero-computation experts
    experts_per_rank: int
    num_topk: int
    slots: int
    row_blocks: int  # most result chunks of a packet, and most row tiles that begin in one
    tile_m_min: int
    tile_m: int
    tile_ffn: int  # columns of a tile, by what the columns are
    tile_shared: int
    tile_hidden: int
    tile_experts: int
    token_block: int
    weight_input: bool  # is a weight applied to the row that is sent, and not to its result?
    routed: bool  # topk_idx and topk_weights were given
    has_logits: bool  # logits were given
    shared_gate: bool  # the shared expert's results have factors
    adds_input: bool  # a zero-computation choice adds its weight times the token
    dispatch_at: int  # byte offsets in a segment
    result_at: int
    dispatch_flag_at: int
    result_flag_at: int
    control_at: int
    again_at: int
    factors_at: int
    dots_at: int
    stage_at: int  # of the stage, which has the shape of all that lies before it
    row_bytes: int
    factor_bytes: int
    deadline_ns: int
    packed: bool  # may a row tile hold rows of several packets?


class Segments(NamedTuple):
    """This rank's segment as typed views, and the addresses at which this rank sees every rank's segment."""

    address: np.ndarray  # int64 [num_ranks]; of a rank on another host, an image of which only control is kept fresh
    room: np.ndarray  # int64 [num_ranks]: what this rank writes for each: into the same, or into its own stage
    remote: np.ndarray  # int64 [num_ranks]: 1 for a rank whose memory this one cannot store into
    wire: np.ndarray  # int64: puts for those (wire.py), empty where there are none; uint64: heap/nvshmem.py
    dispatch: np.ndarray  # elements [num_ranks, experts_per_rank, slots, hidden]
    result: np.ndarray  # elements, likewise
    dispatch_flag: np.ndarray  # int64 [num_ranks, experts_per_rank, 2]: of even calls and of odd ones
    result_flag: np.ndarray  # int64 [num_experts, row_blocks]
    control: np.ndarray  # int64 [CONTROL_WORDS]
    again: np.ndarray  # elements like dispatch: the forward's rows, in a backward that has not kept them; else empty
    factors: np.ndarray  # accumulator [num_ranks, experts_per_rank, slots]: of the rows in dispatch, in a backward
    dots: np.ndarray  # accumulator, likewise: gradients of these factors, beside result


class Experts(NamedTuple):
    """Weights and biases, in whatever form the target's tile GEMM reads (on CPUs a kind of Panels), and kinds."""

    router: Any  # one matrix, of all experts' rows
    up: Any
    down: Any
    shared_up: Any  # of one expert; any that is there, where there is none
    shared_down: Any
    shared_gate: Any  # one row
    rule: RouterRule
    form: Form  # of the hidden rows
    shared_form: Form  # of those of the shared expert
    linear: Form  # of all other products
    norm: ResultNorm


class Tokens(NamedTuple):
    """This rank's tokens, their routing and the slots that follow from it. A block below is a token block."""

    x: np.ndarray  # elements [num_tokens, hidden]
    y: np.ndarray  # elements [num_tokens, hidden]
    logits: np.ndarray  # accumulator [num_tokens, num_choices]
    kept_logits: np.ndarray  # accumulator, likewise, as they were before routing spent them; or empty
    kept_results: np.ndarray  # elements [pairs, hidden]: of experts whose results have a norm, before it; or empty
    values: np.ndarray  # accumulator [num_tokens, num_choices + num_groups], or empty: choice.py
    topk_idx: np.ndarray  # int32 [num_tokens, num_topk]; -1: no choice; from num_experts on: zero-computation experts
    topk_weights: np.ndarray  # accumulator [num_tokens, num_topk]; that of no choice is 0
    factors: np.ndarray  # accumulator [pairs]: of results with their norm, or empty
    place: np.ndarray  # int32 [pairs]: how many earlier pairs of the block chose the same expert
    order: np.ndarray  # int32 [pairs]: the block's pairs that chose an expert, sorted by expert
    counts: np.ndarray  # int32 [blocks, num_experts]
    starts: np.ndarray  # int32 [blocks, num_experts]: where an expert's pairs begin in the block's `order`
    bases: np.ndarray  # int32 [blocks, num_experts]: first slot of the block's pairs
    sent: np.ndarray  # int32 [num_experts]: rows sent, at most `slots`
    results_left: np.ndarray  # int32 [num_experts]: result chunks not seen yet
    needs_left: np.ndarray  # int64 [blocks]: result chunks and shared row tiles that the block's combine still needs
    result_seen: np.ndarray  # int64 [num_experts, row_blocks]: epoch in which the flag was seen
    shared_ups: np.ndarray  # elements [num_tokens, shared_parts * shared_ffn]: products with its up matrices; or empty
    shared_hidden: np.ndarray  # elements [num_tokens, shared_ffn], between the shared expert's products
    shared_results: np.ndarray  # elements [num_tokens, hidden]: what it makes of the tokens
    shared_factors: np.ndarray  # accumulator [num_tokens]: of these results; 1 without a gate
    shared_up_done: np.ndarray  # int64 [shared row tiles]: column tiles finished of a row tile
    shared_down_done: np.ndarray  # int64 [shared row tiles]


class Received(NamedTuple):
    """Packets that this rank received, and how far its experts are with them."""

    seen: np.ndarray  # int64 [packets]: epoch in which the signal was seen
    rows: np.ndarray  # int64 [packets]
    first: np.ndarray  # int64 [packets]: where the packet's rows begin among kept rows
    begun: np.ndarray  # int64 [packets]: row tiles whose first row is in the packet
    streams: np.ndarray  # int64 [experts_per_rank, STREAM_WORDS]: row_tiles.py
    arrived: np.ndarray  # int64 [experts_per_rank, num_ranks]: sources of packets with rows, as they came
    cut: np.ndarray  # int64 [experts_per_rank, num_ranks * row_blocks]: indices of the expert's tiles, as they were cut
    tiles: np.ndarray  # int64 [packets, row_blocks, TILE_WORDS]: those that begin in a packet
    places: np.ndarray  # int64 [rows, PLACE_WORDS]: of tiles with rows of several packets (tile_gemm/rows.py)
    up_done: np.ndarray  # int64 [packets, row_blocks]: column tiles finished of a row tile
    down_done: np.ndarray  # int64 [packets, row_blocks]
    chunk_done: np.ndarray  # int64 [packets, row_blocks]: rows finished of a result chunk
    hidden: np.ndarray  # elements [rows, ffn], between the two matrix products
    kept_rows: np.ndarray  # elements [kept rows, hidden]: what came in; or empty
    kept_ups: np.ndarray  # elements [kept rows, parts * ffn]: their products with the up matrices; or empty
    weights_left: np.ndarray  # int64 [experts_per_rank]: rows that the gradient of an expert's weights still needs


class Queue(NamedTuple):
    """The rank's ticket queue (queue.py)."""

    tasks: np.ndarray  # int64 [max_tasks, TASK_WORDS]
    counters: np.ndarray  # int64 [2, NUM_COUNTERS, COUNTER_STRIDE]


class RankState(NamedTuple):
    """All that is one rank's."""

    problem: Problem
    segments: Segments
    experts: Experts
    tokens: Tokens
    received: Received
    queue: Queue
