"""COMBINE of a backward: gradients of a token block's weights, of its logits, and of its tokens.

The row of a token is summed as in a forward, in the order of its choices; then come the shared expert's row, and that
of the router: gradients of logits times its matrix. The last token block lets the gradients of the router begin.
"""

from __future__ import annotations

from flashmoe_numba.device import (
    add_part,
    block_sync,
    jit,
    lane,
    lanes,
    load,
    part_columns,
    store_part,
    zero_sums,
)
from flashmoe_numba.tile_gemm import tile_gemm
from reference.task_kinds import ROUTER_WEIGHTS

from ..combine import choices_of, chose_zero, result_row
from ..gemms import finished_last
from ..in_order import nothing_kept, rooms_in_order, rows_in_order
from ..queue import QueueTask, reserve
from ..router_gradient import route_token_back
from ..sizes import down_tiles, num_token_blocks
from ..weights import UP, fill_weights
from .state import COMBINES


@jit
def combine(p, tokens, segments, experts, back, gradients, queue, scratch, token_block):
    first = token_block * p.token_block
    rows = min(p.token_block, p.num_tokens - first)
    choices = choices_of(p, tokens, token_block)
    for pair in range(first * p.num_topk + lane(), (first + rows) * p.num_topk, lanes()):
        back.weight_gradients[pair] = weight_gradient_of(p, tokens, segments, experts, back, choices, pair)
    block_sync()
    if not p.routed:
        for token in range(first + lane(), first + rows, lanes()):
            make_logits_gradient(p, tokens, experts.rule, back, token)
        block_sync()
        if not p.has_logits:
            multiply_by_router(p, tokens, experts, back, scratch, first, rows)
            block_sync()
    add_rows(p, tokens, segments, experts, back, choices, scratch, first, rows)
    if p.router_weight_tasks > 0:
        block_sync()
        if lane() == 0 and finished_last(back.done, COMBINES, num_token_blocks(p)):
            place = reserve(p, queue, p.router_weight_tasks)
            fill_weights(p, queue, place, QueueTask(ROUTER_WEIGHTS, UP, 0, 0, 0), p.num_choices, p.hidden)


@jit
def make_logits_gradient(p, tokens, rule, back, token):
    """By way of the token's weights, which is all that a bias of logits gets, and what others say of the logits."""
    first, end = token * p.num_choices, (token + 1) * p.num_choices
    for i in range(first, end):
        back.logits_gradient[i] = rule.one - rule.one
    route_token_back(p, tokens, rule, back, token)
    if back.bias_rows.size > 0:
        for i in range(first, end):
            back.bias_rows[i] = back.logits_gradient[i]
    if back.said.size > 0:
        for i in range(first, end):
            back.logits_gradient[i] += back.said[i]


@jit
def weight_gradient_of(p, tokens, segments, experts, back, choices, pair):
    """dy times what the pair's weight was applied to; 0 where it added nothing."""
    x_at, row = pair // p.num_topk * p.hidden, result_row(choices, pair)
    zero = experts.rule.one - experts.rule.one
    if row >= 0 and p.weight_input:
        return product(p, tokens.x, x_at, segments.result, row * p.hidden, zero)
    if row >= 0:
        return back.norm_dots[pair] if experts.norm.scale.size > 0 else segments.dots[row]
    if p.adds_input and chose_zero(choices, pair):
        return product(p, tokens.x, x_at, back.dy, x_at, zero)
    return zero


@jit
def product(p, a, a_at, b, b_at, zero):
    total = zero
    for c in range(p.hidden):
        total += load(a, a_at + c) * load(b, b_at + c)
    return total


@jit
def multiply_by_router(p, tokens, experts, back, scratch, first, rows):
    words = tokens.needs_left
    a, out = rows_in_order(back.logits_gradient, first, words), rooms_in_order(back.router_rows, first, words)
    for n in range(down_tiles(p)):
        tile_gemm(out, nothing_kept(out), a, rows, back.router, 0, n, experts.linear, scratch)


@jit
def add_rows(p, tokens, segments, experts, back, choices, scratch, first, rows):
    """dx of a token block. A lane sums a part of a row at a time."""
    hidden, num_topk, one = p.hidden, p.num_topk, experts.rule.one
    by_router = not p.routed and not p.has_logits
    width = min(part_columns(back.dx, segments.result, hidden), part_columns(back.dx, back.router_rows, hidden))
    width = min(width, part_columns(back.dx, back.dy, hidden))
    parts = (hidden + width - 1) // width
    for i in range(lane(), rows * parts, lanes()):
        token, column = first + i // parts, i % parts * width
        columns = min(width, hidden - column)
        sums = zero_sums(scratch.sums, columns)
        for pair in range(token * num_topk, (token + 1) * num_topk):
            row, weight = result_row(choices, pair), tokens.topk_weights[pair]
            if row >= 0:
                factor = weight if p.weight_input else one
                add_part(sums, columns, segments.result, row * hidden + column, factor)
            elif p.adds_input and chose_zero(choices, pair):
                add_part(sums, columns, back.dy, token * hidden + column, weight)
        if p.shared_ffn > 0 and tokens.shared_factors[token] != 0:
            add_part(sums, columns, tokens.shared_results, token * hidden + column, one)
            if p.shared_gate:
                add_part(sums, columns, back.shared_gate, column, back.gate_gradients[token])
        if by_router:
            add_part(sums, columns, back.router_rows, token * hidden + column, one)
        store_part(back.dx, token * hidden + column, sums, columns)
