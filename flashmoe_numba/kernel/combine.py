"""Combine: results back into token order, summed in the order of a token's choices."""

from __future__ import annotations

from flashmoe_numba.device import add_part, jit, lane, lanes, part_columns, store_part, zero_sums


@jit
def combine(p, tokens, segments, scratch, token_block):
    """y = sum of weight * result over a token's choices, in that order. A lane sums a part of a row at a time.

    Nothing is added for a dropped pair, nor for a weight of 0, as no choice has it: there may be no result, and 0 times
    an infinity is NaN.
    """
    # named before the loops, because a GPU loads a field wherever it is named
    hidden, slots, num_topk, block_at = p.hidden, p.slots, p.num_topk, token_block * p.num_experts
    topk_idx, topk_weights, bases, place = tokens.topk_idx, tokens.topk_weights, tokens.bases, tokens.place
    y, result, working = tokens.y, segments.result, scratch.sums
    first = token_block * p.token_block
    width = part_columns(y, result, hidden)
    parts = (hidden + width - 1) // width
    for i in range(lane(), min(p.token_block, p.num_tokens - first) * parts, lanes()):
        token, column = first + i // parts, i % parts * width
        columns = min(width, hidden - column)
        sums = zero_sums(working, columns)
        for j in range(num_topk):
            pair = token * num_topk + j
            e, weight = topk_idx[pair], topk_weights[pair]
            if weight != 0:
                slot = bases[block_at + e] + place[pair]
                if slot < slots:
                    add_part(sums, columns, result, (e * slots + slot) * hidden + column, weight)
        store_part(y, token * hidden + column, sums, columns)
