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
def adjust_logits(p, rule, logits, at):
    """Bias, scale and cap, in place."""
    for e in range(p.num_choices):
        logit = logits[at + e]
        if rule.logit_bias.size > 0:
            logit += rule.logit_bias[e]
        logit *= rule.logit_scale
        if rule.logit_cap > 0:
            logit = soft_capped(logit, rule.logit_cap)
        logits[at + e] = logit


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
    total, width = best - best, rule.jitter + rule.jitter
    for e in range(number):
        logit = logits[at + e]
        is_near = best - logit <= width * abs(logit) or best - logit <= width * best
        if is_near and logit > -math.inf:
            total += math.exp(logit - best)
    return rule.one / total
