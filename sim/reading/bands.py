"""What went on in each rank over time, as bands of step functions: what pictures and pages draw.

A band is one resource of a rank: its multiprocessors, with all engines in them (loads and epilogues that run beside
products), its OS block, its host, what runs on none of these (meetings, copy engines), and its links. The parts of a
band are kinds of tasks, a link's one part is the share of its bandwidth. Ranks may be put into groups, whose levels are
summed.

Leaves out: how a transfer's pace changes while it is under way: its bytes are spread evenly over its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..drafting.machine import SM_SLOTS
from ..engine.graph import NONE, Array
from ..engine.kinds import JOIN, KIND_NAMES
from ..simulation import Simulation
from .measures import OFF_SM, horizon_ns, num_slots, places
from .steps import Steps, levels

BESIDE = "meetings, copies"
SERVER_BANDS = (*reversed(OFF_SM), SM_SLOTS, BESIDE)
RATE_UNITS = 10**6  # of a byte per nanosecond: levels are summed as integers, exactly


class Band(NamedTuple):
    """Args:
    name: of the resource.
    full: the level at which one rank's is full; several tasks of a multiprocessor's engines may be more.
    parts: steps of all groups, by kind of task; of a link, by its name.
    """

    name: str
    full: float
    parts: dict[str, Steps]


def each_rank(ranks: Sequence[int], num_ranks: int) -> Array:
    """`[num_ranks]`: the group of each rank if these are groups of one; -1 for all others."""
    group = np.full(num_ranks, NONE)
    group[list(ranks)] = np.arange(len(ranks))
    return group


def bands(simulation: Simulation, group: Array) -> list[Band]:
    """The bands in which anything happened.

    Args:
        group: `[num_ranks]`, from 0 up; ranks of -1 are left out.
    """
    return [*server_bands(simulation, group), *link_bands(simulation, group)]


def server_bands(simulation: Simulation, group: Array) -> list[Band]:
    """Those of servers, and `BESIDE`, in the order of `SERVER_BANDS`."""
    graph, time = simulation.graph, simulation.timeline
    of_server = [SERVER_BANDS.index(s.name if s.name in OFF_SM else SM_SLOTS) for s in graph.servers]
    band = np.array([*of_server, SERVER_BANDS.index(BESIDE)])[graph.nodes["server"]]
    kind, of_node = graph.nodes["kind"], group[places(graph)]
    key = np.where((of_node == NONE) | (kind == JOIN), NONE, band * len(KIND_NAMES) + kind)[time.run_node]
    end = np.where(graph.nodes["server"][time.run_node] == NONE, time.run_arrive_ns, time.run_end_ns)
    found: dict[int, dict[str, Steps]] = {}
    for value in np.unique(key[key != NONE]).tolist():
        runs = np.flatnonzero(key == value)
        held = (of_node[time.run_node[runs]], time.run_start_ns[runs], end[runs], time.run_count[runs])
        steps = levels(*held, int(group.max()) + 1, horizon_ns(simulation))
        found.setdefault(value // len(KIND_NAMES), {})[KIND_NAMES[value % len(KIND_NAMES)]] = steps
    full = {SM_SLOTS: num_slots(simulation)}
    return [Band(SERVER_BANDS[at], full.get(SERVER_BANDS[at], 1), parts) for at, parts in sorted(found.items())]


def link_bands(simulation: Simulation, group: Array) -> list[Band]:
    """Those of links that carried something, by name in the order of the graph; levels are shares of the bandwidth."""
    graph, time = simulation.graph, simulation.timeline
    names = list(dict.fromkeys(link.name for link in graph.links))
    of_link = np.array([*(names.index(link.name) for link in graph.links), NONE])
    runs, link, rank = _of_each_rank(simulation, *_carried(simulation))
    owner = group[rank]
    nbytes = graph.nodes["nbytes"][time.run_node[runs]] * time.run_count[runs]
    start, end = time.run_end_ns[runs], time.run_arrive_ns[runs] - graph.nodes["latency_ns"][time.run_node[runs]]
    rate = nbytes / np.maximum(1, end - start) / np.array([of.gbps for of in graph.links] or [1.0])[link]
    units = np.rint(rate * RATE_UNITS).astype(np.int64)
    result = []
    for index, name in enumerate(names):
        mine = np.flatnonzero((of_link[link] == index) & (owner != NONE))
        if len(mine):
            held = (owner[mine], start[mine], end[mine], units[mine])
            steps = levels(*held, int(group.max()) + 1, horizon_ns(simulation))
            result.append(Band(name, 1, {name: steps._replace(level=steps.level / RATE_UNITS)}))
    return result


def _of_each_rank(simulation: Simulation, runs: Array, link: Array) -> tuple[Array, Array, Array]:
    """The same runs and links once for each rank that a link belongs to, and the rank."""
    links, num_ranks = simulation.graph.links, simulation.world.num_ranks
    first = np.array([of.rank for of in links], np.int64)
    number = np.array([min(of.num_ranks, num_ranks - of.rank) for of in links], np.int64)[link]
    place = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
    link = np.repeat(link, number)
    return np.repeat(runs, number), link, first[link] + place


def _carried(simulation: Simulation) -> tuple[Array, Array]:
    """Runs that put bytes on a link, and the link: once for each of the two links of a path."""
    graph, time = simulation.graph, simulation.timeline
    sides = [graph.nodes[side][time.run_node] for side in ("egress", "ingress")]
    sends = [np.flatnonzero((link != NONE) & (graph.nodes["nbytes"][time.run_node] > 0)) for link in sides]
    return np.concatenate(sends), np.concatenate([link[runs] for link, runs in zip(sides, sends, strict=True)])
