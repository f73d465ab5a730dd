"""The tasks of a simulation as slices in lanes: what a trace shows, whatever its format.

A lane is one slot of one of a rank's servers, the lowest that is free. A run of several tasks is as many slices. A task
that runs on another rank's server, as a pull does, is shown there with its own rank as the peer. Tasks without a server
(meetings, copy engines, collectives) have lanes of their own, in which a slice ends when the bytes are there.

Leaves out: ranks and times beyond `MAX_SLICES` slices; JOINs; which slot a real GPU would take.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from reference.traces import Slice

from ..engine.graph import NONE, Array
from ..engine.kinds import JOIN
from ..simulation import Simulation
from .measures import check_runs, places

MAX_SLICES = 200_000  # viewers get slow with more


@dataclass(frozen=True, eq=False)
class Trace:
    """Args:
    slices: in the order in which they started.
    lanes: name of each (rank, lane).
    first: index of the first slice of each node that has one.
    ranks: those whose slices these are.
    until_ns: where they were cut off, the makespan if nowhere.
    """

    slices: list[Slice]
    lanes: dict[tuple[int, int], str]
    first: dict[int, int]
    ranks: list[int]
    until_ns: int


def make_trace(simulation: Simulation, ranks: Sequence[int] | None = None) -> Trace:
    """Slices of these ranks, by default the first ones that fit into `MAX_SLICES`; at least one, if need be cut off."""
    check_runs(simulation)
    nodes, time = simulation.graph.nodes, simulation.timeline
    chosen = _choose(simulation, ranks)
    shown = np.isin(places(simulation.graph), chosen) & (nodes["kind"] != JOIN)
    runs = np.flatnonzero(shown[time.run_node])
    kept = int((np.cumsum(time.run_count[runs], dtype=np.int64) <= MAX_SLICES).sum())
    until = time.makespan_ns if kept == len(runs) else int(time.run_start_ns[runs[kept]])
    slices, first = _slices(simulation, runs[:kept])
    names = _lane_names(simulation)
    lanes = {lane: names(*lane) for lane in sorted({(of.rank, of.lane) for of in slices})}
    return Trace(slices, lanes, first, chosen, until)


def _choose(simulation: Simulation, ranks: Sequence[int] | None) -> list[int]:
    nodes, num_ranks = simulation.graph.nodes, simulation.world.num_ranks
    if ranks is None:
        counts = np.where(nodes["kind"] == JOIN, 0, nodes["count"])
        tasks = np.bincount(places(simulation.graph), counts, minlength=num_ranks)
        return list(range(max(1, int((np.cumsum(tasks) <= MAX_SLICES).sum()))))
    for rank in ranks:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"ranks must be in [0, {num_ranks}), got {rank}")
    return sorted(set(ranks))


class _Lanes:
    """Numbers from `first` up, the lowest free one first."""

    def __init__(self, first: int) -> None:
        self.fresh = count(first)
        self.free: list[int] = []
        self.held: list[tuple[int, int]] = []  # heap of (end, lane)

    def take(self, start: int, end: int) -> int:
        """A lane that is free at `start`, which never decreases from call to call."""
        while self.held and self.held[0][0] <= start:
            heapq.heappush(self.free, heapq.heappop(self.held)[1])
        lane = heapq.heappop(self.free) if self.free else next(self.fresh)
        heapq.heappush(self.held, (end, lane))
        return lane


def _first_lanes(simulation: Simulation) -> tuple[dict[int, int], dict[int, int]]:
    """The first lane of each server, and of each rank's tasks without one: after those of all its servers."""
    room: dict[int, int] = defaultdict(int)
    first = {}
    for index, server in enumerate(simulation.graph.servers):
        first[index] = room[server.rank]
        room[server.rank] += server.slots
    return first, room


def _slices(simulation: Simulation, runs: Array) -> tuple[list[Slice], dict[int, int]]:
    """The tasks of these runs in lanes, and the first slice of each node."""
    nodes, time = simulation.graph.nodes, simulation.timeline
    node = time.run_node[runs]
    server = nodes["server"][node]
    place = places(simulation.graph)[node]
    columns = [
        place,
        nodes["kind"][node],
        np.where(place == nodes["rank"][node], nodes["peer"][node], nodes["rank"][node]),
        nodes["expert"][node],
        nodes["m"][node],
        node,
        server,
        time.run_count[runs],
        index_in_node(time.run_node, time.run_count)[runs],
        time.run_start_ns[runs],
        np.where(server == NONE, time.run_arrive_ns[runs], time.run_end_ns[runs]),
    ]
    return _in_lanes(zip(*(column.tolist() for column in columns), strict=True), *_first_lanes(simulation))


def _in_lanes(
    runs: Iterable[tuple[int, ...]], first_of_server: dict[int, int], first_of_rank: dict[int, int]
) -> tuple[list[Slice], dict[int, int]]:
    """Each task of each run in the lowest lane that is free; runs come in the order in which they started."""
    lanes: dict[tuple[int, int], _Lanes] = {}
    slices: list[Slice] = []
    first: dict[int, int] = {}
    for rank, kind, peer, expert, m, of, on, tasks, n, begin, finish in runs:
        first.setdefault(of, len(slices))
        if (rank, on) not in lanes:
            lanes[rank, on] = _Lanes(first_of_rank[rank] if on == NONE else first_of_server[on])
        for task in range(tasks):
            lane = lanes[rank, on].take(begin, finish)
            slices.append(Slice(rank, lane, kind, peer, expert, m, n + task, begin, finish))
    return slices, first


def index_in_node(run_node: Array, run_count: Array) -> Array:
    """`[num_runs]`: how many tasks of its node started before each run."""
    order = np.argsort(run_node, kind="stable")
    before = np.cumsum(run_count[order], dtype=np.int64) - run_count[order]
    of_node = run_node[order]
    index = np.empty(len(order), np.int64)
    index[order] = before - before[np.searchsorted(of_node, of_node)]
    return index


def _lane_names(simulation: Simulation) -> Callable[[int, int], str]:
    """The name of a lane by its rank and number."""
    first, room = _first_lanes(simulation)
    names = {}
    for index, server in enumerate(simulation.graph.servers):
        for slot in range(server.slots):
            names[server.rank, first[index] + slot] = f"{server.name} {slot}" if server.slots > 1 else server.name
    return lambda rank, lane: names.get((rank, lane), f"no server {lane - room[rank]}")
