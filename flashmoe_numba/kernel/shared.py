"""The shared expert: one that every token goes through, on the token's own rank.

Its rows are the tokens where they lie: no packet, no slot, no signal. A row tile is `tile_m` tokens, whose last SHARED0
queues its SHARED1s, and whose last SHARED1 counts down the token blocks that it holds tokens of. A row tile's first
SHARED0 also makes the factors of its results, where the shared expert has a gate.

SHARED0 waits for nothing, but packets for other ranks are to leave first. So only as many are queued behind the gates
as there are processors without one, and all others behind the dispatches: processors multiply while packets travel.
"""

from __future__ import annotations

from flashmoe_numba.device import block_sync, formulas, jit, lane, lanes
from flashmoe_numba.tile_gemm import tile_gemm
from reference.task_kinds import SHARED0, SHARED1

from .combine import need
from .gemms import finished_last, queue_down
from .in_order import nothing_kept, rooms_in_order, rows_in_order
from .queue import QueueTask, fill, reserve
from .sizes import down_tiles, num_gate_tasks, shared_row_tiles, shared_up_tiles

sigmoid = jit(formulas.sigmoid)


@jit
def queue_early_shared(p, queue):
    """Behind the gates: a task for each processor that has none."""
    queue_shared(p, queue, 0, num_early(p))


@jit
def queue_late_shared(p, queue):
    """Behind the dispatches: the others."""
    queue_shared(p, queue, num_early(p), shared_row_tiles(p) * shared_up_tiles(p))


@jit
def num_early(p):
    return min(shared_row_tiles(p) * shared_up_tiles(p), max(p.num_processors - num_gate_tasks(p), 0))


@jit
def queue_shared(p, queue, first, end):
    """Queue some of the SHARED0 tasks, all row tiles of a column tile in a row: they share weights."""
    if first < end:
        place = reserve(p, queue, end - first)
        for i in range(first, end):
            m, n = i % shared_row_tiles(p), i // shared_row_tiles(p)
            fill(p, queue, place + i - first, QueueTask(SHARED0, 0, 0, m, n))


@jit(large=True)
def shared0(p, tokens, experts, queue, scratch, task):
    """One column tile of the up projections; the last one of a row tile lets the down projection begin."""
    first = task.m * p.tile_m
    rows = min(p.tile_m, p.num_tokens - first)
    words = tokens.needs_left
    a, out = rows_in_order(tokens.x, first, words), rooms_in_order(tokens.shared_hidden, first, words)
    kept = rooms_in_order(tokens.shared_ups, first, words)
    tile_gemm(out, kept, a, rows, experts.shared_up, 0, task.n, experts.shared_form, scratch)
    if p.shared_gate and task.n == 0:
        out = rooms_in_order(tokens.shared_factors, first, words)
        tile_gemm(out, nothing_kept(out), a, rows, experts.shared_gate, 0, 0, experts.linear, scratch)
        block_sync()
        for token in range(first + lane(), first + rows, lanes()):
            tokens.shared_factors[token] = sigmoid(tokens.shared_factors[token], experts.rule.one)
    block_sync()
    if lane() == 0 and finished_last(tokens.shared_up_done, task.m, shared_up_tiles(p)):
        queue_down(p, queue, QueueTask(SHARED1, 0, 0, task.m, 0))


@jit
def shared1(p, tokens, experts, queue, scratch, task):
    """One column tile of the down projection; the last one of a row tile tells the token blocks."""
    first = task.m * p.tile_m
    rows = min(p.tile_m, p.num_tokens - first)
    words = tokens.needs_left
    a, out = rows_in_order(tokens.shared_hidden, first, words), rooms_in_order(tokens.shared_results, first, words)
    tile_gemm(out, nothing_kept(out), a, rows, experts.shared_down, 0, task.n, experts.linear, scratch)
    block_sync()
    if lane() == 0 and finished_last(tokens.shared_down_done, task.m, down_tiles(p)):
        for b in range(first // p.token_block, (first + rows - 1) // p.token_block + 1):
            need(p, tokens, queue, b, -1)


@jit
def count_shared_tiles(p, token_block):
    """Row tiles of the shared expert that hold tokens of this block."""
    first = token_block * p.token_block
    end = min(first + p.token_block, p.num_tokens)
    return (end - 1) // p.tile_m - first // p.tile_m + 1 if p.shared_ffn > 0 else 0
