"""Combine: results back into token order, summed in the order of a token's choices, then the shared expert's."""

from __future__ import annotations

import math

from flashmoe_numba.device import (
    add_part,
    block_sync,
    fetch_add,
    jit,
    lane,
    lanes,
    load,
    part_columns,
    scale_part,
    store_part,
    zero_sums,
)
from reference.task_kinds import COMBINE

from .queue import QueueTask, push


@jit
def need(p, tokens, queue, token_block, more):
    """A token block needs so many more results, or fewer; whoever finds that it needs no more queues its COMBINE.

    Counts come in any order: it is below zero while shared row tiles are done and the gate has not said what there is.
    """
    if fetch_add(tokens.needs_left, token_block, more) + more == 0:
        push(p, queue, QueueTask(COMBINE, 0, 0, token_block, 0))


@jit
def combine(p, tokens, segments, norm, scratch, token_block):
    """y = sum of factor * result over a token's choices, in that order. A lane sums a part of a row at a time.

    A factor is the weight, or what `make_factors` made of it. The result of a zero-computation expert is the token
    itself, or nothing; the shared expert's comes last. Nothing is added for a dropped pair, nor for a weight of 0, as
    no choice has it: there may be no result, and 0 times an infinity is NaN.
    """
    # named before the loops, because a GPU loads a field wherever it is named
    hidden, slots, num_topk, block_at = p.hidden, p.slots, p.num_topk, token_block * p.num_experts
    num_experts, adds_input, shares, x = p.num_experts, p.adds_input, p.shared_ffn > 0, tokens.x
    shared_results, shared_factors = tokens.shared_results, tokens.shared_factors
    topk_idx, topk_weights, bases, place = tokens.topk_idx, tokens.topk_weights, tokens.bases, tokens.place
    y, result, working = tokens.y, segments.result, scratch.sums
    first = token_block * p.token_block
    rows = min(p.token_block, p.num_tokens - first)
    factors, scale, has_norm = topk_weights, norm.scale, norm.scale.size > 0
    if tokens.factors.size > 0:
        factors = tokens.factors
        make_factors(p, tokens, result, norm, block_at, first * num_topk, rows * num_topk)
        block_sync()
    width = part_columns(y, result, hidden)
    if adds_input:
        width = min(width, part_columns(y, x, hidden))
    parts = (hidden + width - 1) // width
    for i in range(lane(), rows * parts, lanes()):
        token, column = first + i // parts, i % parts * width
        columns = min(width, hidden - column)
        sums = zero_sums(working, columns)
        for j in range(num_topk):
            pair = token * num_topk + j
            e, weight = topk_idx[pair], topk_weights[pair]
            if weight != 0 and e < num_experts:
                slot = bases[block_at + e] + place[pair]
                if slot < slots:
                    add_part(sums, columns, result, (e * slots + slot) * hidden + column, factors[pair])
            elif weight != 0 and adds_input and not has_norm:
                add_part(sums, columns, x, token * hidden + column, weight)
        if has_norm:
            scale_part(sums, columns, scale, column)
        if has_norm and adds_input:  # what is no result has no scale
            for pair in range(token * num_topk, (token + 1) * num_topk):
                if topk_weights[pair] != 0 and topk_idx[pair] >= num_experts:
                    add_part(sums, columns, x, token * hidden + column, topk_weights[pair])
        if shares and shared_factors[token] != 0:
            add_part(sums, columns, shared_results, token * hidden + column, shared_factors[token])
        store_part(y, token * hidden + column, sums, columns)


@jit
def make_factors(p, tokens, result, norm, block_at, first, num_pairs):
    """Factors of results, a lane for a pair: the weight, or 1 where that was applied before; divided by the norm."""
    for pair in range(first + lane(), first + num_pairs, lanes()):
        weight, e = tokens.topk_weights[pair], tokens.topk_idx[pair]
        if weight != 0 and e < p.num_experts:
            slot = tokens.bases[block_at + e] + tokens.place[pair]
            if slot < p.slots:
                factor = weight / weight if p.weight_input else weight
                if norm.scale.size > 0:
                    factor = factor / row_norm(p, result, (e * p.slots + slot) * p.hidden, norm)
                tokens.factors[pair] = factor


@jit
def row_norm(p, result, at, norm):
    """sqrt(mean(v^2) + eps) of v = scale * result, summed in the order of columns."""
    total = norm.eps - norm.eps
    for c in range(p.hidden):
        value = norm.scale[c] * load(result, at + c)
        total += value * value
    return math.sqrt(total / norm.columns + norm.eps)
