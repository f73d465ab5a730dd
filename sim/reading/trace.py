"""A simulation as a Chrome trace, in the form of the kernel's own traces, so that the two can be laid side by side.

A process is a rank, with its slices in the lanes of `sim.reading.lanes`. Counters show the slots that are held and the
bytes under way on each link; an arrow leads from each packet's DISPATCH to the first GEMM0 that it made possible. Open
the file at https://ui.perfetto.dev or chrome://tracing.

Leaves out: arrows beyond `MAX_FLOWS`; what does not fit into the lanes, which the file says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.graph import NONE, Array
from ..engine.kinds import DISPATCH, GEMM0, JOIN, KIND_NAMES, RECEIVE
from ..simulation import Simulation
from .lanes import Slice, Trace, make_trace
from .report import horizon_ns
from .steps import levels

MAX_FLOWS = 4096


def write_chrome_trace(simulation: Simulation, file: Path | str, ranks: Sequence[int] | None = None) -> None:
    """Write the trace of these ranks, one event per line; by default of as many as `lanes.MAX_SLICES` allows.

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
