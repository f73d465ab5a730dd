"""Combine: results back into token order, summed in the order of a token's choices."""

from __future__ import annotations

import math

from flashmoe_numba.device import (
    add_part,
    block_sync,
    jit,
    lane,
    lanes,
    load,
    part_columns,
    scale_part,
    store_part,
    zero_sums,
)


@jit
def combine(p, tokens, segments, norm, scratch, token_block):
    """y = sum of factor * result over a token's choices, in that order. A lane sums a part of a row at a time.

    A factor is the weight, or what `make_factors` made of it. Nothing is added for a dropped pair, nor for a weight of
    0, as no choice has it: there may be no result, and 0 times an infinity is NaN.
    """
    # named before the loops, because a GPU loads a field wherever it is named
    hidden, slots, num_topk, block_at = p.hidden, p.slots, p.num_topk, token_block * p.num_experts
    topk_idx, topk_weights, bases, place = tokens.topk_idx, tokens.topk_weights, tokens.bases, tokens.place
    y, result, working = tokens.y, segments.result, scratch.sums
    first = token_block * p.token_block
    rows = min(p.token_block, p.num_tokens - first)
    factors, scale = topk_weights, norm.scale
    if tokens.factors.size > 0:
        factors = tokens.factors
        make_factors(p, tokens, result, norm, block_at, first * num_topk, rows * num_topk)
        block_sync()
    width = part_columns(y, result, hidden)
    parts = (hidden + width - 1) // width
    for i in range(lane(), rows * parts, lanes()):
        token, column = first + i // parts, i % parts * width
        columns = min(width, hidden - column)
        sums = zero_sums(working, columns)
        for j in range(num_topk):
            pair = token * num_topk + j
            e = topk_idx[pair]
            if topk_weights[pair] != 0:
                slot = bases[block_at + e] + place[pair]
                if slot < slots:
                    add_part(sums, columns, result, (e * slots + slot) * hidden + column, factors[pair])
        if scale.size > 0:
            scale_part(sums, columns, scale, column)
        store_part(y, token * hidden + column, sums, columns)


@jit
def make_factors(p, tokens, result, norm, block_at, first, num_pairs):
    """Factors of results, a lane for a pair: the weight, or 1 where that was applied before; divided by the norm."""
    for pair in range(first + lane(), first + num_pairs, lanes()):
        weight, e = tokens.topk_weights[pair], tokens.topk_idx[pair]
        if weight != 0:
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
