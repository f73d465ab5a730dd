"""The router: logits of tokens (scores.py), the experts of the best (choice.py), zero-computation ones among
them, and their weights.

What reference/routers.py says, with everything in the type of sums and each sum in the order of experts or choices, by
one lane for a token: the same bits whoever does it.
"""

from __future__ import annotations

import math

from flashmoe_numba.device import block_sync, jit, lane, lanes
from flashmoe_numba.tile_gemm import tile_gemm

from .choice import best_of, make_values, values_place
from .in_order import nothing_kept, rooms_in_order, rows_in_order
from .rules import GIVEN, SOFTMAX, SPARSEMIXER
from .scores import prepare_logits, score_of, sparsemixer_score, sum_exponentials


@jit
def route(p, tokens, experts, scratch, first, rows):
    """topk_idx and topk_weights of some tokens, which spends their logits."""
    if not p.has_logits:
        compute_logits(p, tokens, experts, scratch, first, rows)
    block_sync()
    if tokens.kept_logits.size > 0:
        for i in range(first * p.num_choices + lane(), (first + rows) * p.num_choices, lanes()):
            tokens.kept_logits[i] = tokens.logits[i]
        block_sync()
    for token in range(first + lane(), first + rows, lanes()):
        route_token(p, tokens, experts.rule, token)


@jit
def compute_logits(p, tokens, experts, scratch, first, rows):
    """logits[first:first + rows] = x @ router.T"""
    words = tokens.needs_left
    a, out = rows_in_order(tokens.x, first, words), rooms_in_order(tokens.logits, first, words)
    for n in range((p.num_choices + p.tile_experts - 1) // p.tile_experts):
        tile_gemm(out, nothing_kept(out), a, rows, experts.router, 0, n, experts.linear, scratch)


@jit
def route_token(p, tokens, rule, token):
    """A row with a NaN, or whose largest logit is infinite, spoils its own result only: its weights are NaN."""
    at = token * p.num_choices
    highest = prepare_logits(p, rule, tokens.logits, at)
    if not math.isfinite(highest):
        spoil(p, tokens, rule, token)
        return
    total = sum_exponentials(tokens.logits, at, p.num_choices, highest) if rule.score == SOFTMAX else highest
    if rule.has_values:
        make_values(p, rule, tokens, token, highest, total)
        choose(p, tokens, rule, token, tokens.values, values_place(p, rule, token), highest, total)
    else:
        choose(p, tokens, rule, token, tokens.logits, at, highest, total)
    finish_weights(p, tokens, rule, token)


@jit
def spoil(p, tokens, rule, token):
    """Experts 0 to k - 1, unless they are given."""
    for j in range(p.num_topk):
        pair = token * p.num_topk + j
        if rule.choice != GIVEN:
            tokens.topk_idx[pair] = j
        tokens.topk_weights[pair] = math.nan if tokens.topk_idx[pair] >= 0 else 0.0


@jit
def choose(p, tokens, rule, token, values, at, highest, total):
    """Experts by the values from `at` on, or those that are given, and their scores; no choice (-1) has 0."""
    for j in range(p.num_topk):
        pair = token * p.num_topk + j
        if rule.choice != GIVEN:
            tokens.topk_idx[pair] = next_expert(p, rule, values, at, j)
        e = tokens.topk_idx[pair]
        if e >= 0:
            logit = tokens.logits[token * p.num_choices + e]
            if rule.score == SPARSEMIXER:
                score = sparsemixer_score(rule, values, at, p.num_choices, logit)
            else:
                score = score_of(rule, logit, highest, total)
            tokens.topk_weights[pair] = score
            if rule.choice != GIVEN:
                values[at + e] = math.nan  # taken
        else:
            tokens.topk_weights[pair] = 0.0


@jit
def next_expert(p, rule, values, at, j):
    """Of choice j: the last `num_always` choices are the last experts."""
    if j >= p.num_topk - rule.num_always:
        return p.num_choices - p.num_topk + j
    return best_of(values, at, p.num_choices - rule.num_always)


@jit
def finish_weights(p, tokens, rule, token):
    """From scores to weights: the norm and the scales. No choice keeps its 0, also where all have none."""
    first, end = token * p.num_topk, (token + 1) * p.num_topk
    norm = norm_of(rule, tokens.topk_weights, first, end) if rule.renormalize else rule.one
    for pair in range(first, end):
        e = tokens.topk_idx[pair]
        if e >= 0:
            weight = tokens.topk_weights[pair] / norm * rule.scale
            if rule.expert_scale.size > 0:
                weight *= rule.expert_scale[e]
            tokens.topk_weights[pair] = weight


@jit
def norm_of(rule, weights, first, end):
    norm = rule.one - rule.one
    for pair in range(first, end):
        norm += norm_term(rule, weights[pair])
    norm = norm_root(rule, norm) + rule.norm_eps
    return norm if not norm < rule.norm_min else rule.norm_min


@jit
def norm_term(rule, score):
    return score if rule.norm_order == 1 else score * score


@jit
def norm_root(rule, total):
    return total if rule.norm_order == 1 else math.sqrt(total)
