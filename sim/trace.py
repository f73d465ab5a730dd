"""A simulation as a Chrome trace, in the form of the kernel's own traces, so that the two can be laid side by side.

A process is a rank and a lane is one slot of one of its servers; slices have the names and arguments of
`reference.Task`, of which a run of several tasks is as many slices. A task that runs on another rank's server, as a
pull does, is shown there with its own rank as the peer. Tasks without a server (meetings, copy engines, collectives)
have lanes of their own, in which a slice ends when the bytes are there. Counters show the slots that are held and the
bytes under way on each link; an arrow leads from each packet's DISPATCH to the first GEMM0 that it made possible. Open
the file at https://ui.perfetto.dev or chrome://tracing.

Leaves out: ranks and times beyond `MAX_SLICES` slices, which the file says; JOINs; which slot a real GPU would take.
"""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .graph import NONE, Array
from .kinds import DISPATCH, GEMM0, JOIN, KIND_NAMES, RECEIVE
from .report import check_runs, horizon_ns, places
from .simulate import Simulation
from .steps import levels

MAX_SLICES = 200_000  # viewers get slow with more
MAX_FLOWS = 4096


class Slice(NamedTuple):
    """One task in a lane; `lane` is the thread's number within the rank."""

    rank: int
    lane: int
    kind: int
    peer: int
    expert: int
    m: int
    n: int
    start_ns: int
    end_ns: int


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


def write_chrome_trace(simulation: Simulation, file: Path | str, ranks: Sequence[int] | None = None) -> None:
    """Write the trace of these ranks, one event per line; by default of as many as `MAX_SLICES` allows.

    Raises:
        ValueError: there is no such rank.
    """
    trace = make_trace(simulation, ranks)
    events = ",\n".join(json.dumps(event) for event in chrome_events(simulation, trace))
    other = json.dumps({"simulated": True, "note": note(simulation, trace)})
    Path(file).write_text(
        f'{{"displayTimeUnit": "ns", "otherData": {other}, "traceEvents": [\n{events}\n]}}\n', encoding="utf-8"
    )


def note(simulation: Simulation, trace: Trace) -> str:
    """What the file shows, and what it does not."""
    world = simulation.world
    text = (
        f"simulated {simulation.policy} on {world.hardware.name}: {len(trace.slices):,} of "
        f"{_num_tasks(simulation):,} tasks, {len(trace.ranks)} of {world.num_ranks} ranks"
    )
    cut = trace.until_ns < simulation.timeline.makespan_ns
    return f"{text}, cut off at {trace.until_ns / 1000:g} us" if cut else text


def _num_tasks(simulation: Simulation) -> int:
    nodes = simulation.graph.nodes
    return int(nodes["count"][nodes["kind"] != JOIN].sum(dtype=np.int64))


# ---- slices


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
    lanes = {(rank, lane): names[rank](lane) for rank, lane in sorted({(of.rank, of.lane) for of in slices})}
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
    first_of_server, first_of_rank = _first_lanes(simulation)
    lanes: dict[tuple[int, int], _Lanes] = {}
    node = time.run_node[runs]
    server = nodes["server"][node]
    end = np.where(server == NONE, time.run_arrive_ns[runs], time.run_end_ns[runs])
    place = places(simulation.graph)[node]
    peer = np.where(place == nodes["rank"][node], nodes["peer"][node], nodes["rank"][node])
    columns = [place, nodes["kind"][node], peer, nodes["expert"][node], nodes["m"][node]]
    columns += [node, server, time.run_count[runs], index_in_node(time.run_node, time.run_count)[runs]]
    columns += [time.run_start_ns[runs], end]
    slices: list[Slice] = []
    first: dict[int, int] = {}
    for rank, kind, peer, expert, m, of, on, tasks, n, begin, finish in zip(
        *(c.tolist() for c in columns), strict=True
    ):
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


def _lane_names(simulation: Simulation) -> dict[int, Any]:
    """For each rank, the name of a lane by its number."""
    first, room = _first_lanes(simulation)
    names: dict[int, dict[int, str]] = defaultdict(dict)
    for index, server in enumerate(simulation.graph.servers):
        for slot in range(server.slots):
            names[server.rank][first[index] + slot] = f"{server.name} {slot}" if server.slots > 1 else server.name

    def named(rank: int) -> Any:
        return lambda lane: names[rank].get(lane, f"no server {lane - room[rank]}")

    return {rank: named(rank) for rank in range(simulation.world.num_ranks)}


# ---- events


def chrome_events(simulation: Simulation, trace: Trace) -> Iterator[dict[str, Any]]:
    """Names of ranks (pid) and lanes (tid), a slice per task, counters, arrows. Times are microseconds."""
    yield from _names(simulation, trace)
    yield from map(_slice, trace.slices)
    yield from _slot_counters(simulation, trace)
    yield from _link_counters(simulation, trace)
    yield from _flows(simulation, trace)


def _names(simulation: Simulation, trace: Trace) -> Iterator[dict[str, Any]]:
    hardware = simulation.world.hardware.name
    for rank in trace.ranks:
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}, simulated {hardware}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
    for (rank, lane), name in trace.lanes.items():
        about = {"ph": "M", "pid": rank, "tid": lane}
        yield about | {"name": "thread_name", "args": {"name": name}}
        yield about | {"name": "thread_sort_index", "args": {"sort_index": lane}}


def _slice(task: Slice) -> dict[str, Any]:
    args = {"peer": task.peer, "expert": task.expert, "m": task.m, "n": task.n}
    duration = {"dur": (task.end_ns - task.start_ns) / 1000, "args": args}
    return {"ph": "X", "name": KIND_NAMES[task.kind], "cat": "task", **_at(task), **duration}


def _at(task: Slice) -> dict[str, Any]:
    return {"pid": task.rank, "tid": task.lane, "ts": task.start_ns / 1000}


def _slot_counters(simulation: Simulation, trace: Trace) -> Iterator[dict[str, Any]]:
    """Slots held, a counter per server."""
    graph, time = simulation.graph, simulation.timeline
    server = graph.nodes["server"][time.run_node]
    runs = np.flatnonzero(server != NONE)
    held = (server[runs], time.run_start_ns[runs], time.run_end_ns[runs], time.run_count[runs])
    yield from _counters(simulation, trace, graph.servers, held, "slots held")


def _link_counters(simulation: Simulation, trace: Trace) -> Iterator[dict[str, Any]]:
    """Bytes under way, a counter per link."""
    graph, time = simulation.graph, simulation.timeline
    nbytes = graph.nodes["nbytes"][time.run_node] * time.run_count
    for side in ("egress", "ingress"):
        link = graph.nodes[side][time.run_node]
        runs = np.flatnonzero((link != NONE) & (nbytes > 0))
        carried = (link[runs], time.run_end_ns[runs], time.run_arrive_ns[runs], nbytes[runs])
        yield from _counters(simulation, trace, graph.links, carried, "bytes under way")


def _counters(
    simulation: Simulation, trace: Trace, resources: Sequence[Any], held: tuple[Array, Array, Array, Array], unit: str
) -> Iterator[dict[str, Any]]:
    """The levels of the resources of the trace's ranks that were used, up to where it is cut off."""
    used, owner = np.unique(held[0]), np.array([resource.rank for resource in resources] or [0])
    steps = levels(*held, len(resources), horizon_ns(simulation))
    shown = np.isin(steps.group, used) & np.isin(owner[steps.group], trace.ranks) & (steps.left < trace.until_ns)
    kept = (steps.group[shown].tolist(), steps.left[shown].tolist(), steps.level[shown].tolist())
    for index, left, level in zip(*kept, strict=True):
        name = f"{resources[index].name}: {unit}"
        yield {"ph": "C", "name": name, "pid": resources[index].rank, "ts": left / 1000, "args": {unit: level}}


def _flows(simulation: Simulation, trace: Trace) -> Iterator[dict[str, Any]]:
    """Two events per packet: the arrow's start in the DISPATCH slice and its end at the GEMM0 slice."""
    for number, (sent, used) in enumerate(islice(_packets(simulation, trace), MAX_FLOWS)):
        flow = {"name": "packet", "cat": "packet", "id": number}
        yield {"ph": "s", **flow, **_at(sent)}
        yield {"ph": "f", "bp": "e", **flow, **_at(used)}


def _packets(simulation: Simulation, trace: Trace) -> Iterator[tuple[Slice, Slice]]:
    """First slices of each DISPATCH and of the GEMM0 that started first after it, where both are in the trace."""
    known: dict[int, int] = {}
    for node, index in trace.first.items():
        if simulation.graph.nodes["kind"][node] == DISPATCH:
            used = trace.first.get(_first_gemm(simulation, node, known))
            if used is not None:
                yield trace.slices[index], trace.slices[used]


def _first_gemm(simulation: Simulation, node: int, known: dict[int, int]) -> int:
    """The first GEMM0 to start among those that wait for the node, directly or by way of RECEIVE and JOIN; or NONE."""
    if node not in known:
        kind, start = simulation.graph.nodes["kind"], simulation.timeline.start_ns
        found = []
        for after in simulation.graph.successors(node).tolist():
            passed = kind[after] in (RECEIVE, JOIN)
            found.append(_first_gemm(simulation, after, known) if passed else after if kind[after] == GEMM0 else NONE)
        known[node] = min((of for of in found if of != NONE), key=lambda of: start[of], default=NONE)
    return known[node]
