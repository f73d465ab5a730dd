"""The fitted knobs of each (policy, GPU): those with the smallest relative error over its rows.

Tables of few rows count as much as long ones: the error is the mean over (source, model) of the means over their rows.
Every row is simulated at the `NODES`, and its time between them taken as a straight line in the logarithm over each
knob's; of a fine grid the best point counts. So no valley is missed, and leaving rows out costs nothing more. What a
fit is told to reach is simulated again. Some tables say nothing of a knob, such as the rate where a scheduler is the
bound: so each costs `PULL` per factor of e away from what the policy's other GPUs say. Where there are none, it is only
`PULL_ALONE` away from the default, which nobody has measured: a weak table says more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import product

import numpy as np

from ..drafting.rates import MOST_RATE, RATE, SCHEDULE, Values, fitted_knobs, fitted_values
from ..engine.graph import Array
from .cases import Case
from .compare import Result, mean_error

PULL = 0.1
PULL_ALONE = 0.02
NODES = {
    RATE: (0.12, 0.17, 0.24, 0.33, 0.45, 0.63, MOST_RATE),
    SCHEDULE: (40, 80, 130, 200, 300, 400, 600),
}
POINTS = 121  # of the fine grid, for each knob

Key = tuple[str, str]  # policy and GPU kind


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The fitted knobs of one policy on one GPU; errors are means over `num_rows` rows, before and after."""

    policy: str
    gpu: str
    num_rows: int
    old_values: Values
    old_error: float
    values: Values
    error: float


def fit_all(cases: Iterable[Case]) -> list[Fit]:
    """A fit for every policy and GPU that has rows marked as fitted."""
    groups = fitted_cases(cases)
    values = fit_values(groups)
    return [_fit(key, group, values[key]) for key, group in sorted(groups.items())]


def fitted_cases(cases: Iterable[Case]) -> dict[Key, list[Case]]:
    """The cases to which numbers are fitted, by what these belong to."""
    groups: dict[Key, list[Case]] = {}
    for case in cases:
        if case.rule.fitted:
            groups.setdefault(case.rate_key, []).append(case)
    return groups


def fit_values(groups: Mapping[Key, Sequence[Case]]) -> dict[Key, Values]:
    """The fitted knobs of each group: alone first, and then with what that gave for the policy's other GPUs."""
    alone = {key: _best(key, group, fitted_values(*key, table={}), PULL_ALONE) for key, group in groups.items()}
    found = dict(alone)
    for key, group in groups.items():
        known = others(alone, key)
        if any(known.values()):
            found[key] = _best(key, group, fitted_values(*key, table=known), PULL)
    return found


def others(values: Mapping[Key, Values], key: Key) -> dict[str, dict[str, Values]]:
    """A table of what the policy's other GPUs have."""
    policy, gpu = key
    return {policy: {kind: found for (of, kind), found in values.items() if of == policy and kind != gpu}}


def error_of(cases: Iterable[Case], values: Values) -> float:
    """The mean error of rows with these values."""
    return mean_error(Result(case=case, simulated=case.simulated(values)) for case in cases)


def _fit(key: Key, cases: Sequence[Case], values: Values) -> Fit:
    policy, gpu = key
    old = fitted_values(policy, gpu)
    return Fit(
        policy=policy,
        gpu=gpu,
        num_rows=len(cases),
        old_values=old,
        old_error=error_of(cases, old),
        values=values,
        error=error_of(cases, values),
    )


def _best(key: Key, cases: Sequence[Case], prior: Values, pull: float) -> Values:
    """The best point of the fine grid."""
    knobs = fitted_knobs(key[0])
    folds: dict[tuple[str, str], list[Array]] = {}
    for case in cases:
        folds.setdefault(case.fold, []).append(np.abs(_curve(case, knobs) / case.measured - 1))
    cost = np.mean([np.mean(errors, axis=0) for errors in folds.values()], axis=0)
    for axis, knob in enumerate(knobs):
        away = np.abs(np.log(_fine(knob) / prior[knob]))
        cost = cost + pull * np.expand_dims(away, tuple(other for other in range(len(knobs)) if other != axis))
    place = np.unravel_index(np.argmin(cost), cost.shape)
    return {knob: _value(knob, _fine(knob)[index]) for knob, index in zip(knobs, place, strict=True)}


@lru_cache(maxsize=4096)
def _curve(case: Case, knobs: tuple[str, ...]) -> Array:
    """What the case gives, at every point of the fine grid, an axis for each knob."""
    nodes = [NODES[knob] for knob in knobs]
    at_nodes = [case.simulated(dict(zip(knobs, values, strict=True))) for values in product(*nodes)]
    result = np.log(at_nodes).reshape([len(values) for values in nodes])
    for axis, knob in enumerate(knobs):
        result = np.apply_along_axis(partial(_interpolated, knob), axis, result)
    return np.exp(result)


def _interpolated(knob: str, at_nodes: Array) -> Array:
    return np.interp(np.log(_fine(knob)), np.log(NODES[knob]), at_nodes)


def _fine(knob: str) -> Array:
    return np.geomspace(NODES[knob][0], NODES[knob][-1], POINTS)


def _value(knob: str, value: float) -> float:
    return float(f"{value:.3g}") if knob == RATE else round(value)
