"""Combine: results back into token order, summed in the order of a token's choices."""

from __future__ import annotations

from flashmoe_numba.device import jit, lane, lanes, load, store


@jit
def combine(p, tokens, segments, scratch, token_block):
    """y = sum of weight * result over a token's choices, in that order.

    Nothing is added for a dropped pair, nor for a weight of 0, as no choice has it: there may be no result, and 0 times
    an infinity is NaN.
    """
    first = token_block * p.token_block
    for token in range(first, min(first + p.token_block, p.num_tokens)):
        for c in range(lane(), p.hidden, lanes()):
            store(scratch.sums, c, tokens.topk_weights.dtype.type(0))
        for j in range(p.num_topk):
            pair = token * p.num_topk + j
            e = tokens.topk_idx[pair]
            if tokens.topk_weights[pair] != 0:
                slot = tokens.bases[token_block * p.num_experts + e] + tokens.place[pair]
                if slot < p.slots:
                    add_row(p, segments, scratch, e * p.slots + slot, tokens.topk_weights[pair])
        for c in range(lane(), p.hidden, lanes()):
            store(tokens.y, token * p.hidden + c, load(scratch.sums, c))


@jit
def add_row(p, segments, scratch, row, weight):
    for c in range(lane(), p.hidden, lanes()):
        store(scratch.sums, c, load(scratch.sums, c) + weight * load(segments.result, row * p.hidden + c))
