"""The rate of each (policy, GPU): the one with the smallest mean relative error over all rows marked as fitted.

The error is neither smooth in the rate nor has it always one valley, so the search is a logarithmic grid, then ever
finer ones between the neighbours of the best. A rate is kept with three digits: the tables have no more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..drafting.rates import FILE, fitted_rate, fitted_rates
from .cases import Case
from .compare import Result, mean_error

LOWEST = 0.05
POINTS = 8
ROUNDS = 3
HEADER = """\
# Share of the tensor peak that the tiles of each policy reach on each GPU, see rates.py.
# Written by `flashmoe validate --fit`; beside each: the rows it was fitted to, and their mean relative error.
"""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """One fitted rate; errors are means over `num_rows` rows, with the rate before and the new one."""

    policy: str
    gpu: str
    num_rows: int
    old_rate: float
    old_error: float
    rate: float
    error: float


def fit_all(cases: Iterable[Case]) -> list[Fit]:
    """A fit for every policy and GPU that has rows marked as fitted."""
    by_key: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        if case.rule.fitted:
            by_key.setdefault(case.rate_key, []).append(case)
    return [_fit(policy, gpu, group) for (policy, gpu), group in sorted(by_key.items())]


def _fit(policy: str, gpu: str, cases: Sequence[Case]) -> Fit:
    old = fitted_rate(policy, gpu)
    error, rate = _search(cases)
    return Fit(
        policy=policy,
        gpu=gpu,
        num_rows=len(cases),
        old_rate=old,
        old_error=_error(cases, old),
        rate=rate,
        error=error,
    )


def _search(cases: Sequence[Case]) -> tuple[float, float]:
    """(error, rate) of the best."""
    tried: dict[float, float] = {}
    low, high = LOWEST, 1.0
    for _ in range(ROUNDS):
        grid = [float(f"{rate:.3g}") for rate in np.geomspace(low, high, POINTS)]
        tried |= {rate: _error(cases, rate) for rate in grid if rate not in tried}
        best = min(tried, key=lambda rate: tried[rate])
        known = sorted(tried)
        at = known.index(best)
        low, high = known[max(0, at - 1)], known[min(len(known) - 1, at + 1)]
    return tried[best], best


def _error(cases: Sequence[Case], rate: float) -> float:
    return mean_error(Result(case=case, simulated=case.simulated(rate)) for case in cases)


def write_rates(fits: Iterable[Fit], *, keep: bool = False) -> None:
    """The rates into the file that `sim.drafting.rates` reads; with `keep`, beside those of others that are there."""
    lines = _lines_there() if keep and FILE.exists() else {}
    for fit in fits:
        rows = "1 row" if fit.num_rows == 1 else f"{fit.num_rows} rows"
        lines[fit.policy, fit.gpu] = f"{fit.gpu} = {fit.rate} # {rows}, {fit.error:.1%}\n"
    text = HEADER
    for policy, group in itertools.groupby(sorted(lines), key=lambda key: key[0]):
        text += f"\n[{policy}]\n" + "".join(lines[key] for key in group)
    FILE.write_text(text, encoding="utf-8")
    fitted_rates.cache_clear()


def _lines_there() -> dict[tuple[str, str], str]:
    """Each rate's line with what is said beside it, by policy and GPU."""
    lines, policy = {}, ""
    for line in FILE.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.startswith("["):
            policy = line.strip().strip("[]")
        elif not line.startswith("#") and "=" in line:
            lines[policy, line.partition("=")[0].strip()] = line
    return lines
