"""Slopes of what scores.py computes: derivatives of one number by another, in the type of sums."""

from __future__ import annotations

import math

from flashmoe_numba.device import jit

from .rules import SOFTMAX, SQRT_SOFTPLUS
from .scores import scaled_logit, sigmoid, softplus


@jit
def score_slope(rule, logit):
    """Of the logarithm of the logit's own score, as if a softmax had a constant divisor.

    Of the logarithm: a score that is nearly 0 has a slope that is nearly 0, and is divided by a norm that may be.
    """
    if rule.score == SOFTMAX:
        return rule.one
    if rule.score == SQRT_SOFTPLUS:
        square = softplus(logit, rule.one)
        ratio = sigmoid(logit, rule.one) / square if square > 0 else rule.one  # its limit
        return ratio / (rule.one + rule.one)
    return sigmoid(-logit, rule.one)


@jit
def norm_slope(rule, score, root):
    """Of the norm by one of its scores."""
    return rule.one if rule.norm_order == 1 else score / root


@jit
def logit_slope(rule, logit, e):
    """Of the logit with bias, scale and cap by the raw one."""
    if rule.logit_cap > 0:
        return rule.logit_scale * cap_slope(scaled_logit(rule, logit, e), rule.logit_cap)
    return rule.logit_scale


@jit
def cap_slope(x, limit):
    """1 - tanh(x / limit)^2, without its cancellation."""
    one, t = limit / limit, x / limit
    power = math.exp(-abs(t + t))  # it cannot overflow
    double = (one + one) / (one + power)
    return double * double * power
