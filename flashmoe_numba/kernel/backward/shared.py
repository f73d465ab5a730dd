"""The shared expert in a backward: its rows are the tokens where they lie, and their factors those of its gate."""

from __future__ import annotations

from flashmoe_numba.device import block_sync, jit, lane, lanes, load
from flashmoe_numba.tile_gemm import hidden_gradient, tile_gemm
from reference.task_kinds import SHARED1, SHARED_WEIGHTS

from ..combine import need
from ..gemms import finished_last, queue_down
from ..in_order import nothing_kept, rooms_in_order, rows_in_order
from ..queue import QueueTask, reserve
from ..sizes import down_tiles, shared_row_tiles, shared_up_tiles
from ..state import IS_LAST
from ..weights import DOWN, GATE, UP, fill_weights
from .state import SHARED_TILES


@jit(large=True)
def shared0(p, tokens, experts, back, queue, scratch, box, task):
    """One column tile of gradients of its hidden rows; the last one of a row tile makes those of the gate."""
    first = task.m * p.tile_m
    rows = min(p.tile_m, p.num_tokens - first)
    words = tokens.needs_left
    kept, dy = rows_in_order(tokens.shared_ups, first, words), rows_in_order(back.dy, first, words)
    if p.recomputes:
        out, ups = rooms_in_order(tokens.shared_hidden, first, words), rooms_in_order(tokens.shared_ups, first, words)
        x = rows_in_order(tokens.x, first, words)
        tile_gemm(out, ups, x, rows, experts.shared_up, 0, task.n, experts.shared_form, scratch)
        block_sync()
    hidden_gradient(
        kept, back.shared_up_gradients, back.shared_active, back.shared_dots, tokens.shared_factors, p.shared_parts,
        dy, rows, back.shared_down, 0, task.n, experts.shared_form, scratch,
    )  # fmt: skip
    block_sync()
    if lane() == 0:
        box[IS_LAST] = finished_last(tokens.shared_up_done, task.m, shared_up_tiles(p))
    block_sync()
    if box[IS_LAST]:
        if p.shared_gate:
            make_gate_gradients(p, tokens, experts.rule, back, first, rows)
            block_sync()
        if lane() == 0:
            queue_down(p, queue, QueueTask(SHARED1, 0, 0, task.m, 0))
            if p.shared_weight_tasks > 0 and finished_last(back.done, SHARED_TILES, shared_row_tiles(p)):
                queue_shared_weights(p, queue)


@jit
def make_gate_gradients(p, tokens, rule, back, first, rows):
    """Of the logit of a token's factor f: f * (1 - f) times dy times the shared expert's result."""
    for token in range(first + lane(), first + rows, lanes()):
        at, factor = token * shared_up_tiles(p), tokens.shared_factors[token]
        total = back.shared_dots[at]
        for n in range(1, shared_up_tiles(p)):
            total += back.shared_dots[at + n]
        if back.shared_down_bias.size > 0:
            for c in range(p.hidden):
                total += load(back.dy, token * p.hidden + c) * back.shared_down_bias[c]
        back.gate_gradients[token] = total * factor * (rule.one - factor) if factor != 0 else factor


@jit
def shared1(p, tokens, experts, back, queue, scratch, task):
    """One column tile of its rows of dx; the last one of a row tile tells the token blocks."""
    first = task.m * p.tile_m
    rows = min(p.tile_m, p.num_tokens - first)
    words = tokens.needs_left
    out = rooms_in_order(tokens.shared_results, first, words)
    gradients = rows_in_order(back.shared_up_gradients, first, words)
    tile_gemm(out, nothing_kept(out), gradients, rows, back.shared_up, 0, task.n, experts.linear, scratch)
    block_sync()
    if lane() == 0 and finished_last(tokens.shared_down_done, task.m, down_tiles(p)):
        for b in range(first // p.token_block, (first + rows - 1) // p.token_block + 1):
            need(p, tokens, queue, b, -1)


@jit
def queue_shared_weights(p, queue):
    """All gradients of the shared expert's hidden rows are made: those of its weights can be."""
    place, ups = reserve(p, queue, p.shared_weight_tasks), p.shared_parts * p.shared_ffn
    place = fill_weights(p, queue, place, QueueTask(SHARED_WEIGHTS, UP, 0, 0, 0), ups, p.hidden)
    place = fill_weights(p, queue, place, QueueTask(SHARED_WEIGHTS, DOWN, 0, 0, 0), p.hidden, p.shared_ffn)
    if p.shared_gate:
        fill_weights(p, queue, place, QueueTask(SHARED_WEIGHTS, GATE, 0, 0, 0), 1, p.hidden)
