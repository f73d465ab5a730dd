"""The router's backward: from gradients of weights to those of the raw logits and of the experts' scales.

With scores s of the choices, their norm n (1 where there is none), parts s / n, which the scales make weights of, and
gradients g of the parts, that of s_j is (g_j - c dn/ds_j) / n with c = sum_i g_i s_i / n. A softmax takes from each of
all experts its score times sum_j s_j ds_j, which is c where n is constant, and else c norm_eps / n, because
sum_j s_j dn/ds_j = n - norm_eps: nothing cancels, and an expert that was not chosen gets 0 where it does not matter.

The choice of experts has no gradient. As in router.py, everything is in the type of sums and each sum in the order of
experts or choices, by one lane for a token or an expert: the same bits whoever does it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from flashmoe_numba.device import jit, lane, lanes

from .router import norm_root, norm_term
from .rules import SOFTMAX, SPARSEMIXER
from .scores import near_exponential, prepare_logits, score_of, sparsemixer_score, sum_exponentials
from .slopes import logit_slope, norm_slope, score_slope


class Scoring(NamedTuple):
    """What the scores of a token's logits follow from, and what those of its choices are divided by."""

    highest: Any
    total: Any
    root: Any  # the norm, without what is added to it
    norm: Any
    is_constant: bool  # has the divisor no gradient?


@jit
def route_token_back(p, tokens, rule, back, token):
    """Add to a token's `back.logits_gradient` what its `back.weight_gradients` say, by its `back.kept_logits`.

    `tokens.logits` is its working memory. A token that the router spoilt has NaN.
    """
    at = token * p.num_choices
    for i in range(at, at + p.num_choices):
        tokens.logits[i] = back.kept_logits[i]
    highest = prepare_logits(p, rule, tokens.logits, at)
    if not math.isfinite(highest):
        for i in range(at, at + p.num_choices):
            back.logits_gradient[i] = math.nan
    elif rule.score == SPARSEMIXER:
        sparsemixer_back(p, tokens, rule, back, token)
    else:
        scoring = find_scoring(p, tokens, rule, token, highest)
        common = common_gradient(p, tokens, rule, back, token, scoring)
        choices_back(p, tokens, rule, back, token, scoring, common)
        if rule.score == SOFTMAX:
            common = common if scoring.is_constant else common * (rule.norm_eps / scoring.norm)
            softmax_back(p, tokens, rule, back, token, scoring, common)


@jit
def find_scoring(p, tokens, rule, token, highest):
    at, zero = token * p.num_choices, rule.one - rule.one
    total = sum_exponentials(tokens.logits, at, p.num_choices, highest) if rule.score == SOFTMAX else zero
    if not rule.renormalize:
        return Scoring(highest, total, zero, rule.one, True)
    root = zero
    for pair in range(token * p.num_topk, (token + 1) * p.num_topk):
        e = tokens.topk_idx[pair]
        if e >= 0:
            root += norm_term(rule, score_of(rule, tokens.logits[at + e], highest, total))
    root = norm_root(rule, root)
    norm = root + rule.norm_eps
    if norm < rule.norm_min:
        return Scoring(highest, total, root, rule.norm_min, True)
    return Scoring(highest, total, root, norm, root == 0)  # then all scores are 0


@jit
def part_of(rule, scoring, logit):
    """The score over the norm."""
    return score_of(rule, logit, scoring.highest, scoring.total) / scoring.norm


@jit
def part_gradient(rule, back, pair, e):
    gradient = back.weight_gradients[pair] * rule.scale
    return gradient * rule.expert_scale[e] if rule.expert_scale.size > 0 else gradient


@jit
def common_gradient(p, tokens, rule, back, token, scoring):
    """The sum of parts times their gradients."""
    common = rule.one - rule.one
    for pair in range(token * p.num_topk, (token + 1) * p.num_topk):
        e = tokens.topk_idx[pair]
        if e >= 0:
            part = part_of(rule, scoring, tokens.logits[token * p.num_choices + e])
            common += part_gradient(rule, back, pair, e) * part
    return common


@jit
def choices_back(p, tokens, rule, back, token, scoring, common):
    """By way of each choice's own score: its part's, and its part in the norm."""
    for pair in range(token * p.num_topk, (token + 1) * p.num_topk):
        e = tokens.topk_idx[pair]
        if e >= 0:
            i = token * p.num_choices + e
            gradient = part_gradient(rule, back, pair, e)
            if not scoring.is_constant:
                score = score_of(rule, tokens.logits[i], scoring.highest, scoring.total)
                gradient -= common * norm_slope(rule, score, scoring.root)
            gradient *= part_of(rule, scoring, tokens.logits[i]) * score_slope(rule, tokens.logits[i])
            back.logits_gradient[i] += gradient * logit_slope(rule, back.kept_logits[i], e)


@jit
def softmax_back(p, tokens, rule, back, token, scoring, common):
    """By way of the sum that all scores are divided by."""
    for e in range(p.num_choices):
        i = token * p.num_choices + e
        gradient = common * score_of(rule, tokens.logits[i], scoring.highest, scoring.total)
        back.logits_gradient[i] -= gradient * logit_slope(rule, back.kept_logits[i], e)


@jit
def sparsemixer_back(p, tokens, rule, back, token):
    """By way of the softmax of each choice, which spends the logits: NaN is what is taken."""
    at = token * p.num_choices
    for pair in range(token * p.num_topk, (token + 1) * p.num_topk):
        chosen = tokens.topk_idx[pair]
        best = tokens.logits[at + chosen]
        score = sparsemixer_score(rule, tokens.logits, at, p.num_choices, best)
        gradient = part_gradient(rule, back, pair, chosen) * score
        for e in range(p.num_choices):
            share = near_exponential(rule, tokens.logits[at + e], best) * score
            own = rule.one - share if e == chosen else -share
            back.logits_gradient[at + e] += gradient * own * logit_slope(rule, back.kept_logits[at + e], e)
        tokens.logits[at + chosen] = math.nan


@jit
def scale_gradient(p, tokens, rule, back, out):
    """Add to out `[num_choices]` the gradient of `expert_scale`, a lane for an expert, pairs in order.

    Nothing where there is none. A weight of 0 has no gradient, so what the scale multiplied is found by a division.
    """
    if rule.expert_scale.size == 0:
        return
    for pair in range(p.num_tokens * p.num_topk):
        e = tokens.topk_idx[pair]
        if e >= 0 and e % lanes() == lane() and tokens.topk_weights[pair] != 0:
            out[e] += back.weight_gradients[pair] * (tokens.topk_weights[pair] / rule.expert_scale[e])
