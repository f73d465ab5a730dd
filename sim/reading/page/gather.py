"""What a page shows of one simulation, as a value that JSON can hold: a band for each resource, path, links, floors.

Its size is bounded by the number of levels that it may have: series with more are folded, and ranks that would leave
too few levels for each are left out, which `notes` says. The mean over all ranks is always there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...engine.graph import Array
from ...engine.kinds import KIND_NAMES
from ...simulation import Simulation
from ..bands import Band, bands, each_rank
from ..explain import CATEGORIES, LATENCY, SLOT, TRANSFER, Explanation, Step, explain, merged, running
from ..report import check_runs, horizon_ns, num_slots, places
from ..steps import levels
from .fold import Series, is_folded, series
from .roofline import roofline

MOST_LEVELS = 400_000  # of a whole page: some 3 MB
MOST_RANKS = 16
LEAST, MOST = 120, 4_000  # levels of a series
MOST_OF_PATH = 1_000  # levels of each category on each lane
MOST_STEPS = 30
Gathered = dict[str, Any]


def gather(simulation: Simulation, num_simulations: int = 1) -> Gathered:
    """All but its report.

    Args:
        num_simulations: that share the page.

    Raises:
        ValueError: the runs were not kept.
    """
    check_runs(simulation)
    budget = MOST_LEVELS // num_simulations
    found = explain(simulation.graph, simulation.timeline)
    lanes, notes = _lanes(simulation, budget)
    for lane, parts in zip(lanes, _paths(simulation, found.steps, len(lanes)), strict=True):
        lane["path"] = parts
    return {
        "policy": simulation.policy,
        "latency_us": simulation.latency_us,
        "horizon_ns": horizon_ns(simulation),
        "slots": num_slots(simulation),
        "lanes": lanes,
        "path": _path(simulation, found),
        "links": list(_links(simulation)),
        "roofline": roofline(simulation),
        "notes": notes,
    }


# ---- lanes


def _lanes(simulation: Simulation, budget: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The mean of all ranks and the first ranks that the budget allows, and what is not shown."""
    num_ranks = simulation.world.num_ranks
    mean = bands(simulation, np.zeros(num_ranks, np.int64))
    each = max(1, sum(len(band.parts) for band in mean))  # series of a rank, too
    if budget < each * LEAST:
        return [], ["no timeline: too many simulations on one page"]
    shown = min(num_ranks, MOST_RANKS, budget // (each * LEAST) - 1) if num_ranks > 1 else 0
    most = min(MOST, budget // (each * (shown + 1)))
    lanes = [_lane(f"mean of {num_ranks} ranks" if num_ranks > 1 else "rank 0", mean, 0, 1 / num_ranks, most)]
    alone = bands(simulation, each_rank(range(shown), num_ranks)) if shown else []
    lanes += [_lane(f"rank {rank}", alone, rank, 1, most) for rank in range(shown)]
    return lanes, list(_notes(lanes, shown, num_ranks, most))


def _lane(name: str, found: list[Band], group: int, scale: float, most: int) -> dict[str, Any]:
    return {
        "name": name,
        "bands": [
            {
                "name": band.name,
                "full": band.full,
                "parts": {part: series(steps, group, scale, most) for part, steps in band.parts.items()},
            }
            for band in found
        ],
    }


def _notes(lanes: list[dict[str, Any]], shown: int, num_ranks: int, most: int) -> Iterator[str]:
    if num_ranks > 1 and shown < num_ranks:
        yield f"{shown} of {num_ranks} ranks have lanes of their own; the mean is of all"
    every: list[Series] = [part for lane in lanes for band in lane["bands"] for part in band["parts"].values()]
    if is_folded(every):
        folded = sum("every" in one for one in every)
        yield f"{folded} of {len(every)} curves are means over {most:,} equal parts of the time; the others are exact"


# ---- critical path


def _path(simulation: Simulation, found: Explanation) -> dict[str, Any]:
    """Totals by category, and the longest steps in their order."""
    steps = merged(simulation.graph, found.steps)
    longest = sorted(sorted(steps, key=lambda step: step.ready_ns - step.done_ns)[:MOST_STEPS], key=_began)
    return {
        "totals_us": {name: time / 1000 for name, time in found.totals_ns.items()},
        "behind_us": {kind: time / 1000 for kind, time in found.behind.items()},
        "num_steps": len(steps),
        "longest": [_step(simulation, step) for step in longest],
    }


def _began(step: Step) -> int:
    return step.ready_ns


def _paths(simulation: Simulation, steps: Sequence[Step], num_lanes: int) -> Iterator[dict[str, Series]]:
    """For each lane, that of all ranks first, 1 while the path is in a category on its rank, else 0."""
    place = places(simulation.graph)
    for lane in range(num_lanes):
        mine = [step for step in steps if lane == 0 or place[step.node] == lane - 1]
        spans = [span for step in mine for span in _spans(simulation, step)]
        of, start, end = np.array(spans, np.int64).reshape(-1, 3).T
        found = levels(of, start, end, np.ones(len(of), np.int64), len(CATEGORIES), horizon_ns(simulation))
        yield {CATEGORIES[index]: series(found, index, 1, MOST_OF_PATH) for index in np.unique(of).tolist()}


def _spans(simulation: Simulation, step: Step) -> Iterator[tuple[int, int, int]]:
    """Category, start and end of the four times of a node, those that are not empty."""
    at = step.ready_ns
    names = (SLOT, running(simulation.graph, step.node), TRANSFER, LATENCY)
    for name, time in zip(names, (step.slot_ns, step.run_ns, step.transfer_ns, step.latency_ns), strict=True):
        if time:
            yield CATEGORIES.index(name), at, at + time
        at += time


def _step(simulation: Simulation, step: Step) -> dict[str, Any]:
    nodes = simulation.graph.nodes
    times = {name: getattr(step, f"{name}_ns") / 1000 for name in ("slot", "run", "transfer", "latency")}
    return {
        "kind": KIND_NAMES[nodes["kind"][step.node]],
        "rank": int(nodes["rank"][step.node]),
        "count": step.count,
        "from_us": step.ready_ns / 1000,
        "to_us": step.done_ns / 1000,
        **{f"{name}_us": time for name, time in times.items()},
    }


# ---- links


def _links(simulation: Simulation) -> Iterator[dict[str, Any]]:
    """Links of one name together: what the busiest and the mean one carried, and for how long."""
    graph, time = simulation.graph, simulation.timeline
    names = np.array([link.name for link in graph.links], object)
    gbps = np.array([link.gbps for link in graph.links])
    for name in dict.fromkeys(names.tolist()):
        mine = np.flatnonzero(names == name)
        carried = time.link_bytes[mine]
        if carried.any():
            busiest = mine[carried.argmax()]
            yield {
                "name": name,
                "gbps": float(gbps[busiest]),
                "bytes_max": int(carried.max()),
                "bytes_mean": float(carried.mean()),
                "share": _share(time.link_bytes[busiest], gbps[busiest] * horizon_ns(simulation)),
                "busy": _share(time.link_busy_ns[busiest], horizon_ns(simulation)),
                "share_while_busy": _share(time.link_bytes[busiest], gbps[busiest] * time.link_busy_ns[busiest]),
            }


def _share(part: Array, whole: Array | int) -> float:
    return float(part / whole) if whole else 0.0
