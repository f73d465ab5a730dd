"""A simulation as a Chrome trace, in the form of the kernel's own traces, so that the two can be laid side by side.

A process is a rank, with its slices in the lanes of `sim.reading.lanes`. Counters show the slots that are held and the
bytes under way on each link; an arrow leads from each packet's DISPATCH to the first GEMM0 that it made possible.

Leaves out: what does not fit into the lanes, which the file says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference.traces import Event, Slice, counter_event, flow_events, name_events, slice_events, write_events

from ..engine.graph import NONE, Array
from ..engine.kinds import DISPATCH, GEMM0, JOIN, KIND_NAMES, RECEIVE
from ..simulation import Simulation
from .lanes import Trace, make_trace
from .measures import horizon_ns
from .steps import levels


def write_chrome_trace(simulation: Simulation, file: Path | str, ranks: Sequence[int] | None = None) -> None:
    """Write the trace of these ranks, one event per line; by default of as many as `lanes.MAX_SLICES` allows.

    Raises:
        ValueError: there is no such rank.
    """
    trace = make_trace(simulation, ranks)
    about = {"simulated": True, "note": note(simulation, trace)}
    write_events(chrome_events(simulation, trace), file, about)


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


# ---- events


def chrome_events(simulation: Simulation, trace: Trace) -> Iterator[Event]:
    """Names of ranks (pid) and lanes (tid), a slice per task, counters, arrows. Times are microseconds."""
    hardware = simulation.world.hardware.name
    yield from name_events({rank: f"rank {rank}, simulated {hardware}" for rank in trace.ranks}, trace.lanes)
    yield from slice_events(trace.slices, KIND_NAMES)
    yield from _slot_counters(simulation, trace)
    yield from _link_counters(simulation, trace)
    yield from flow_events(_packets(simulation, trace))


def _slot_counters(simulation: Simulation, trace: Trace) -> Iterator[Event]:
    """Slots held, a counter per server."""
    graph, time = simulation.graph, simulation.timeline
    server = graph.nodes["server"][time.run_node]
    runs = np.flatnonzero(server != NONE)
    held = (server[runs], time.run_start_ns[runs], time.run_end_ns[runs], time.run_count[runs])
    yield from _counters(simulation, trace, graph.servers, held, "slots held")


def _link_counters(simulation: Simulation, trace: Trace) -> Iterator[Event]:
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
) -> Iterator[Event]:
    """The levels of the resources of the trace's ranks that were used, up to where it is cut off."""
    used, owner = np.unique(held[0]), np.array([resource.rank for resource in resources] or [0])
    steps = levels(*held, len(resources), horizon_ns(simulation))
    shown = np.isin(steps.group, used) & np.isin(owner[steps.group], trace.ranks) & (steps.left < trace.until_ns)
    kept = (steps.group[shown].tolist(), steps.left[shown].tolist(), steps.level[shown].tolist())
    for index, left, level in zip(*kept, strict=True):
        yield counter_event(resources[index].rank, resources[index].name, unit, left, level)


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
