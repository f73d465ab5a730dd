"""The router: logits of tokens, their softmax, and the experts of the largest, zero-computation ones among them."""

from __future__ import annotations

import math

from flashmoe_numba.device import block_sync, jit, lane, lanes
from flashmoe_numba.tile_gemm import IDENTITY, IN_ORDER, Rooms, Rows, tile_gemm


@jit
def route(p, tokens, experts, scratch, first, rows):
    """topk_idx and topk_weights of some tokens, which spends their logits."""
    compute_logits(p, tokens, experts, scratch, first, rows)
    block_sync()
    for token in range(first + lane(), first + rows, lanes()):
        choose_experts(p, tokens, token)


@jit
def compute_logits(p, tokens, experts, scratch, first, rows):
    """logits[first:first + rows] = x @ router.T"""
    words = tokens.tiles_left  # some words: nothing has a place of its own here
    rows_in = Rows(tokens.x, first, words, IN_ORDER)
    rows_out = Rooms(tokens.logits, first, words, IN_ORDER, words, 0)
    for n in range((p.num_choices + p.tile_experts - 1) // p.tile_experts):
        tile_gemm(rows_out, rows_in, rows, experts.router, 0, n, IDENTITY, scratch)


@jit
def choose_experts(p, tokens, token):
    """Softmax over all experts, greedy top-k on the logits, ties to the lowest index; spends the token's logits.

    A row with a NaN or an infinity chooses experts 0..k-1 with NaN weights, so that it spoils its own result only.
    """
    at = token * p.num_choices
    highest = tokens.logits[at]
    for e in range(p.num_choices):
        if tokens.logits[at + e] > highest:
            highest = tokens.logits[at + e]
    total = highest - highest
    for e in range(p.num_choices):
        total += math.exp(tokens.logits[at + e] - highest)
    chosen = total - total
    for j in range(token * p.num_topk, (token + 1) * p.num_topk):
        best = best_expert(p, tokens, at) if total == total else j - token * p.num_topk
        tokens.topk_idx[j] = best
        tokens.topk_weights[j] = math.exp(tokens.logits[at + best] - highest) / total
        tokens.logits[at + best] = math.nan  # taken
        chosen += tokens.topk_weights[j]
    if p.renormalize:
        for j in range(token * p.num_topk, (token + 1) * p.num_topk):
            tokens.topk_weights[j] = tokens.topk_weights[j] / chosen


@jit
def best_expert(p, tokens, at):
    """The expert of the largest logit that is not NaN."""
    best = -1
    for e in range(p.num_choices):
        logit = tokens.logits[at + e]
        if logit == logit and (best < 0 or logit > tokens.logits[at + best]):
            best = e
    return best
