"""One simulation over several seeds of its routing: the median one, and how far the others are from it.

The median is that of the latency, the lower one of two: always a run that there was, whose other numbers belong to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median_low
from typing import Any

from ..reading.report import Report, report
from ..simulation import Simulation

SPREAD = ("latency_us", "tokens_per_s", "rank_imbalance", "expert_imbalance", "dropped")


def over_seeds(run: Callable[[int], Simulation], seed: int, number: int) -> tuple[Simulation, Report]:
    """The simulation of the median seed of `number` from `seed` on, and its report with the spread over all of them.

    `run` is called with a seed; of one seed there is no spread.
    """
    simulation = run(seed)
    if number == 1:
        return simulation, report(simulation)
    reports = {seed: report(simulation)} | {later: report(run(later)) for later in range(seed + 1, seed + number)}
    middle = median_low(said.latency_us for said in reports.values())
    chosen = next(one for one, said in reports.items() if said.latency_us == middle)
    spread: Mapping[str, Any] = {"seeds": list(reports), "median_seed": chosen} | {
        name: _spread([getattr(said, name) for said in reports.values()]) for name in SPREAD
    }
    simulation = simulation if chosen == seed else run(chosen)  # again: all of them might be too many to keep
    return simulation, replace(reports[chosen], spread=spread)


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median_low(values), "min": min(values), "max": max(values)}
