"""What a page shows of one simulation, as a value that JSON can hold: a band for each resource, path, links, floors.

Its size is bounded by the number of levels that it may have: series with more are folded, and ranks that would leave
too few levels for each are left out, which `notes` says. The mean over all ranks is always there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...engine.graph import NONE, Array
from ...engine.kinds import KIND_NAMES
from ...simulation import Simulation
from ..bands import Band, bands, each_rank
from ..explain import CATEGORIES, LATENCY, SLOT, TRANSFER, Explanation, Step, explain, merged, running
from ..measures import check_runs, horizon_ns, num_slots, places
from ..steps import levels
from .fold import Series, series
from .roofline import doubt, roofline

MOST_LEVELS = 400_000  # of a whole page: some 3 MB
MOST_RANKS = 16
LEAST, MOST = 120, 4_000  # levels of a series
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
    found = explain(simulation.graph, simulation.timeline)
    lanes, notes = _lanes(simulation, found.steps, MOST_LEVELS // num_simulations)
    below = doubt(simulation)
    return {
        "policy": simulation.policy,
        "latency_us": simulation.latency_us,
        "horizon_ns": horizon_ns(simulation),
        "slots": num_slots(simulation),
        "lanes": lanes,
        "path": _path(simulation, found),
        "links": list(_links(simulation)),
        "roofline": roofline(simulation),
        "notes": notes + ([below] if below else []),
    }


# ---- lanes


def _lanes(simulation: Simulation, path: Sequence[Step], budget: int) -> tuple[list[dict[str, Any]], list[str]]:
    """The mean of all ranks and the first ranks that the budget allows, and what is not shown.

    A lane's series get equal parts of what is left for the lanes to come, as long as all of them may have `LEAST`.
    """
    num_ranks = simulation.world.num_ranks
    alone = range(min(num_ranks, MOST_RANKS) if num_ranks > 1 else 0)
    mean = bands(simulation, np.zeros(num_ranks, np.int64))
    each = bands(simulation, each_rank(alone, num_ranks)) if alone else []
    drawn = [(f"mean of {num_ranks} ranks" if alone else "rank 0", NONE, mean, 0, 1 / num_ranks)]
    drawn += [(f"rank {rank}", rank, each, rank, 1) for rank in alone]
    num_series = sum(len(band.parts) for band in mean) + len(CATEGORIES)
    lanes: list[dict[str, Any]] = []
    for name, rank, found, group, scale in drawn:
        most = max(LEAST, budget // (num_series * (len(drawn) - len(lanes))))
        if num_series * most > budget:
            break
        most = min(MOST, most)
        lane = _lane(name, found, group, scale, most)
        lanes.append(lane | {"path": _path_over_time(simulation, path, rank, most)})
        budget -= sum(len(one["level"]) for one in all_series(lanes[-1:]))
    return lanes, list(_notes(lanes, num_ranks))


def all_series(lanes: Sequence[dict[str, Any]]) -> list[Series]:
    found = [part for lane in lanes for band in lane["bands"] for part in band["parts"].values()]
    return found + [part for lane in lanes for part in lane["path"].values()]


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


def _notes(lanes: list[dict[str, Any]], num_ranks: int) -> Iterator[str]:
    if not lanes:
        yield "no timeline: too many simulations on one page"
        return
    if num_ranks > 1 and len(lanes) - 1 < num_ranks:
        yield f"{len(lanes) - 1} of {num_ranks} ranks have lanes of their own; the mean is of all"
    every = all_series(lanes)
    folded = ["every" in one for one in every]
    if any(folded):
        yield f"{sum(folded)} of {len(every)} curves are means over equal parts of the time; the others are exact"


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


def _path_over_time(simulation: Simulation, steps: Sequence[Step], rank: int, most: int) -> dict[str, Series]:
    """1 while the path is in a category on this rank, or with `NONE` on any, else 0."""
    place = places(simulation.graph)
    mine = [step for step in steps if rank in (NONE, place[step.node])]
    spans = [span for step in mine for span in _spans(simulation, step)]
    of, start, end = np.array(spans, np.int64).reshape(-1, 3).T
    found = levels(of, start, end, np.ones(len(of), np.int64), len(CATEGORIES), horizon_ns(simulation))
    return {CATEGORIES[index]: series(found, index, 1, most) for index in np.unique(of).tolist()}


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
