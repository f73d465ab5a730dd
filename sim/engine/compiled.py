"""The engine compiled: the semantics of `plain.py`, event for event, for graphs of millions of nodes.

The state is a few arrays of records, so that what one event touches lies together, and so that the compiled loop can
stop when the arrays of runs are full, be given longer ones, and go on. A run has at most one event at a time: runs and
events need the same room. Unless runs are kept, the place of one that is complete is taken by the next. The end of a
link's next transfer moves with every transfer that comes or goes; it stands in a heap of links in which each link knows
its place.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from . import loop, plain
from .graph import NONE, Array, TaskGraph
from .heaps import COMPILES, EMPTY, EVENT
from .loop import State
from .plain import check_tie_seed
from .progress import watched
from .timeline import Timeline, check_complete

RUN_ARRAYS = ("run_node", "run_count", "run_start_ns", "run_end_ns", "run_arrive_ns")


def run(graph: TaskGraph, *, tie_seed: int | None = None, keep_runs: bool = True) -> Timeline:
    """The timeline of a graph, equal to that of `plain.run`.

    Args:
        keep_runs: False leaves the arrays of runs empty, which saves 100 bytes for each of millions.

    Raises:
        ValueError: no such seed. DeadlockError: a node can never run; says who waits for what.
    """
    if not COMPILES:
        return _run_plain(graph, tie_seed, keep_runs)
    tie_seed = check_tie_seed(tie_seed)
    # One event starts no more runs than there are slots or tasks, or than become ready by it.
    most_ready = int(np.diff(graph.succ_start).max(initial=0))
    margin = min(sum(server.slots for server in graph.servers), graph.num_tasks) + most_ready + 1
    guess = min(graph.num_tasks, (8 if keep_runs else 1) * graph.num_nodes)
    state = _state(graph, room=guess + graph.num_nodes + margin)
    state.counters[loop.SEED] = NONE if tie_seed is None else tie_seed
    state.counters[loop.KEEP_RUNS] = keep_runs
    state.counters[loop.FREE_RUN] = NONE
    state.counters[loop.FIRST_MEMORY] = len(graph.links)
    with watched(graph.num_tasks, state.nodes["undone"]):
        loop.start(state)
        while loop.loop(state, margin) == loop.FULL:
            state = state.longer()
    check_complete(graph, state.nodes["preds_left"])
    return _timeline(state)


def _run_plain(graph: TaskGraph, tie_seed: int | None, keep_runs: bool) -> Timeline:
    warnings.warn("NUMBA_DISABLE_JIT is set: simulations are not compiled, and take far longer", stacklevel=2)
    timeline = plain.run(graph, tie_seed=tie_seed)
    if keep_runs:
        return timeline
    return replace(timeline, **{name: getattr(timeline, name)[:0] for name in RUN_ARRAYS})


def _state(graph: TaskGraph, room: int) -> State:
    return State(
        nodes=_nodes(graph),
        succ=graph.succ,
        servers=_servers(graph),
        links=_links(graph),
        expected=_expected(len(graph.links) + graph.num_memories),
        counters=np.zeros(loop.NUM_COUNTERS, np.int64),
        runs=np.empty(room, loop.RUN),
        marks=np.empty(2 * room, loop.MARK),
        events=np.empty(room, EVENT),
    )


def _nodes(graph: TaskGraph) -> Array:
    nodes = np.zeros(graph.num_nodes, loop.NODE)
    for name in loop.GIVEN:
        nodes[name] = graph.nodes[name]
    nodes["preds_left"] = graph.num_preds
    nodes["unstarted"] = nodes["undone"] = graph.nodes["count"]
    nodes["cause"] = NONE
    nodes["succ_start"], nodes["succ_end"] = graph.succ_start[:-1], graph.succ_start[1:]
    return nodes


def _servers(graph: TaskGraph) -> Array:
    servers = np.zeros(len(graph.servers), loop.SERVER)
    servers["free"] = [server.slots for server in graph.servers]
    servers["head"] = servers["root"] = EMPTY
    return servers


def _links(graph: TaskGraph) -> Array:
    ways = [(link.rank, link.gbps, link.flow_gbps) for link in graph.links]
    if graph.memory is not None:
        ways += [(rank, *graph.memory) for rank in range(graph.num_memories)]
    links = np.zeros(len(ways), loop.LINK)
    for name, values in zip(("rank", "gbps", "flow_gbps"), zip(*ways, strict=True), strict=False):
        links[name] = values
    links["root"] = EMPTY
    links["place"] = np.arange(len(links))
    return links


def _expected(num_links: int) -> Array:
    expected = np.zeros(max(1, num_links), EVENT)  # without links, one that never comes
    expected["time"] = loop.FOREVER
    expected["key"] = expected["item"] = np.arange(len(expected))
    return expected


def _timeline(state: State) -> Timeline:
    runs = state.runs[: state.counters[loop.NUM_RUNS] * state.counters[loop.KEEP_RUNS]]
    node_arrays = {name: state.nodes[name].copy() for name in (*loop.TIMES, "cause")}
    run_arrays = {name: runs[name.removeprefix("run_")].copy() for name in RUN_ARRAYS}
    links = state.links[: state.counters[loop.FIRST_MEMORY]]
    link_arrays = {f"link_{name}": links[name].copy() for name in ("nbytes", "busy_ns", "peak")}
    link_arrays["link_bytes"] = link_arrays.pop("link_nbytes")
    return Timeline(
        **node_arrays,
        **run_arrays,
        **link_arrays,
        queue_peak=state.servers["peak"].copy(),
        num_events=int(state.counters[loop.NUM_EVENTS]),
    )
