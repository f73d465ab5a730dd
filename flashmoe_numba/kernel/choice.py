"""The choice of experts: the largest of some values, perhaps in the best groups; ties go to the lowest index.

Values are the logits, or `tokens.values`, which has for each token a value of each expert, then a score of each group.
The choice spends them: NaN is what is taken.
"""

from __future__ import annotations

import math

from flashmoe_numba.device import jit

from .rules import BY_SCORE, FILL_LOWEST, TOP2_SUM
from .scores import score_of


@jit
def best_of(values, at, number):
    """Index of the largest of so many values that is not NaN."""
    best = -1
    for e in range(number):
        value = values[at + e]
        if value == value and (best < 0 or value > values[at + best]):
            best = e
    return best


@jit
def values_place(p, rule, token):
    """Where a token's values begin in `tokens.values`."""
    return token * (p.num_choices + rule.num_groups)


@jit
def make_values(p, rule, tokens, token, highest, total):
    """What the choice is made on, where it is not the logits."""
    at = values_place(p, rule, token)
    for e in range(p.num_choices - rule.num_always):
        value = tokens.logits[token * p.num_choices + e]
        if rule.choice == BY_SCORE:
            value = score_of(rule, value, highest, total)
        if rule.selection_bias.size > 0:
            value += rule.selection_bias[e]
        tokens.values[at + e] = value
    if rule.num_groups > 1:
        close_groups(p, rule, tokens.values, at)


@jit
def close_groups(p, rule, values, at):
    """Leave values to the best groups only: experts of others get what `group_fill` says."""
    size, scores_at = (p.num_choices - rule.num_always) // rule.num_groups, at + p.num_choices
    for g in range(rule.num_groups):
        values[scores_at + g] = group_score(rule, values, at + g * size, size)
    for _ in range(rule.num_topk_groups):
        values[scores_at + best_of(values, scores_at, rule.num_groups)] = math.nan
    for g in range(rule.num_groups):
        if values[scores_at + g] == values[scores_at + g]:  # not taken
            for e in range(g * size, (g + 1) * size):
                values[at + e] = -math.inf if rule.group_fill == FILL_LOWEST else 0.0


@jit
def group_score(rule, values, at, size):
    best = at + best_of(values, at, size)
    if rule.group_score != TOP2_SUM:
        return values[best]
    second = at if best > at else at + 1
    for i in range(at, at + size):
        if i != best and values[i] > values[second]:
            second = i
    return values[best] + values[second]
