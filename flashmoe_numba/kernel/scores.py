"""Scores of experts: a function of a token's logits, of one number at a time."""

from __future__ import annotations

import math

from flashmoe_numba.device import formulas, jit

from .rules import SOFTMAX, SQRT_SOFTPLUS

sigmoid, softplus, soft_capped = jit(formulas.sigmoid), jit(formulas.softplus), jit(formulas.soft_capped)


@jit
def largest(logits, at, number):
    """The largest of so many logits; NaN if any is."""
    highest = logits[at]
    for e in range(number):
        logit = logits[at + e]
        if logit > highest or logit != logit:
            highest = logit
    return highest


@jit
def prepare_logits(p, rule, logits, at):
    """Bias, scale and cap of a token's logits, in place.

    Returns:
        The largest, which is not finite where the token is spoilt: by its logits, or by a bias or a scale that took
        them out of their type's range.
    """
    highest = largest(logits, at, p.num_choices)
    if math.isfinite(highest) and (rule.logit_bias.size > 0 or rule.logit_scale != 1 or rule.logit_cap > 0):
        for e in range(p.num_choices):
            logit = scaled_logit(rule, logits[at + e], e)
            logits[at + e] = soft_capped(logit, rule.logit_cap) if rule.logit_cap > 0 else logit
        highest = largest(logits, at, p.num_choices)
    return highest


@jit
def scaled_logit(rule, logit, e):
    """With bias and scale, before the cap."""
    if rule.logit_bias.size > 0:
        logit += rule.logit_bias[e]
    return logit * rule.logit_scale


@jit
def sum_exponentials(logits, at, number, highest):
    """What the exponentials of a softmax are divided by."""
    total = highest - highest
    for e in range(number):
        total += math.exp(logits[at + e] - highest)
    return total


@jit
def score_of(rule, logit, highest, total):
    """The score of a logit, which does not depend on what was chosen: of any kind but sparsemixer.

    Args:
        highest, total: of softmax, as `largest` and `sum_exponentials` have them.
    """
    if rule.score == SOFTMAX:
        return math.exp(logit - highest) / total
    if rule.score == SQRT_SOFTPLUS:
        return math.sqrt(softplus(logit, rule.one))
    return sigmoid(logit, rule.one)


@jit
def sparsemixer_score(rule, logits, at, number, best):
    """Softmax of the best logit among those that are not taken (NaN) and near it."""
    total = best - best
    for e in range(number):
        total += near_exponential(rule, logits[at + e], best)
    return rule.one / total


@jit
def near_exponential(rule, logit, best):
    """What a logit adds to that sum."""
    width = rule.jitter + rule.jitter
    is_near = best - logit <= width * abs(logit) or best - logit <= width * best
    return math.exp(logit - best) if is_near and logit > -math.inf else rule.one - rule.one
