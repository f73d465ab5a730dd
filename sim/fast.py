"""The engine compiled: the semantics of `engine.py`, event for event, for graphs of millions of nodes.

The state is arrays, so that the compiled loop can stop when the arrays of runs are full, be given longer ones, and go
on. A run has at most one event at a time, so runs and events need the same room. The end of a link's next transfer
moves with every transfer that comes or goes; it is kept per link in a small heap of its own (`links_*`), in which the
link's place is known and its key is changed in place.
"""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from .engine import RANK_MASK
from .graph import NONE, Array, TaskGraph
from .heaps import EMPTY, event_pop, event_push, pop, push
from .timeline import Timeline, check_complete

SEQUENCE_BITS = 40
NUM_RUNS, NUM_EVENTS_WAITING, SEQUENCE, TURN, NUM_EVENTS, NUM_COUNTERS = range(6)
DONE, FULL = range(2)
FOREVER = np.iinfo(np.int64).max


class Nodes(NamedTuple):
    """Of each node: what the graph says, and how far it is."""

    rank: Array
    count: Array
    server: Array
    priority: Array
    duration_ns: Array
    nbytes: Array
    egress: Array
    ingress: Array
    latency_ns: Array
    succ_start: Array
    succ: Array
    preds_left: Array
    unstarted: Array
    undone: Array
    ready_ns: Array
    start_ns: Array
    done_ns: Array
    cause: Array
    queue_key: Array
    queue_child: Array
    queue_sibling: Array


class Resources(NamedTuple):
    """Of each server, and of each link."""

    free: Array
    queue_root: Array
    queue_length: Array
    queue_peak: Array
    link_rank: Array
    gbps: Array
    flow_gbps: Array
    served: Array
    since: Array
    active: Array
    root: Array
    nbytes: Array
    busy_ns: Array
    peak: Array
    links_time: Array  # heap of links by the end of their next transfer
    links_key: Array
    links_item: Array
    links_place: Array


class Runs(NamedTuple):
    """Of each run, and the heap of their events. Marks have two per run, for its two links: item 2 run + side."""

    node: Array
    count: Array
    start_ns: Array
    end_ns: Array
    paths_left: Array
    event_time: Array
    event_key: Array
    event_item: Array  # 2 run + whether its bytes have arrived
    mark: Array
    mark_child: Array
    mark_sibling: Array


def run(graph: TaskGraph, *, tie_seed: int | None = None) -> Timeline:
    """The timeline of a graph, equal to that of `engine.run`.

    Raises:
        DeadlockError: a node can never run; says who waits for what.
    """
    nodes, resources = _nodes(graph), _resources(graph)
    counters = np.zeros(NUM_COUNTERS, np.int64)
    # One event starts no more runs than there are slots, or than become ready by it.
    most_ready = int(np.diff(graph.succ_start).max(initial=0))
    margin = sum(server.slots for server in graph.servers) + most_ready + 1
    runs = _runs(2 * graph.num_nodes + 2 * margin)
    seed = NONE if tie_seed is None else tie_seed
    _start(nodes, resources, runs, counters, seed)
    while _loop(nodes, resources, runs, counters, seed, margin) == FULL:
        runs = _longer(runs)
    check_complete(graph, nodes.preds_left)
    return _timeline(nodes, resources, runs, counters)


def _nodes(graph: TaskGraph) -> Nodes:
    n, given = graph.num_nodes, graph.nodes
    kept = {name: given[name] for name in Nodes._fields[:9]}
    return Nodes(
        **kept,
        succ_start=graph.succ_start,
        succ=graph.succ,
        preds_left=graph.num_preds.copy(),
        unstarted=given["count"].copy(),
        undone=given["count"].copy(),
        ready_ns=np.zeros(n, np.int64),
        start_ns=np.zeros(n, np.int64),
        done_ns=np.zeros(n, np.int64),
        cause=np.full(n, NONE, np.int32),
        queue_key=np.zeros(n, np.int64),
        queue_child=np.full(n, EMPTY, np.int32),
        queue_sibling=np.full(n, EMPTY, np.int32),
    )


def _resources(graph: TaskGraph) -> Resources:
    servers, links = len(graph.servers), len(graph.links)
    return Resources(
        free=np.array([server.slots for server in graph.servers], np.int64),
        queue_root=np.full(servers, EMPTY, np.int32),
        queue_length=np.zeros(servers, np.int64),
        queue_peak=np.zeros(servers, np.int64),
        link_rank=np.array([link.rank for link in graph.links], np.int64),
        gbps=np.array([link.gbps for link in graph.links], np.float64),
        flow_gbps=np.array([link.flow_gbps for link in graph.links], np.float64),
        served=np.zeros(links, np.float64),
        since=np.zeros(links, np.int64),
        active=np.zeros(links, np.int64),
        root=np.full(links, EMPTY, np.int64),
        nbytes=np.zeros(links, np.int64),
        busy_ns=np.zeros(links, np.int64),
        peak=np.zeros(links, np.int64),
        links_time=np.full(links, FOREVER, np.int64),
        links_key=np.arange(links, dtype=np.int64),
        links_item=np.arange(links, dtype=np.int64),
        links_place=np.arange(links, dtype=np.int64),
    )


def _runs(room: int) -> Runs:
    one = {name: np.empty(room, np.int64) for name in ("start_ns", "end_ns", "event_time", "event_key", "event_item")}
    small = {name: np.empty(room, np.int32) for name in ("node", "count")}
    both = {name: np.empty(2 * room, np.int64) for name in ("mark_child", "mark_sibling")}
    return Runs(**one, **small, **both, paths_left=np.empty(room, np.int8), mark=np.empty(2 * room, np.float64))


def _longer(runs: Runs) -> Runs:
    return Runs(*(np.concatenate([array, np.empty_like(array)]) for array in runs))


def _timeline(nodes: Nodes, resources: Resources, runs: Runs, counters: Array) -> Timeline:
    used = slice(int(counters[NUM_RUNS]))
    return Timeline(
        ready_ns=nodes.ready_ns,
        start_ns=nodes.start_ns,
        done_ns=nodes.done_ns,
        cause=nodes.cause,
        run_node=runs.node[used].copy(),
        run_count=runs.count[used].copy(),
        run_start_ns=runs.start_ns[used].copy(),
        run_end_ns=runs.end_ns[used].copy(),
        link_bytes=resources.nbytes,
        link_busy_ns=resources.busy_ns,
        link_peak=resources.peak,
        queue_peak=resources.queue_peak,
        num_events=int(counters[NUM_EVENTS]),
    )


@njit(cache=True)
def _start(nodes: Any, resources: Any, runs: Any, counters: Any, seed: int) -> None:
    roots = np.flatnonzero(nodes.preds_left == 0)  # before any of them runs
    for node in roots:
        _ready(nodes, resources, runs, counters, seed, node, 0)


@njit(cache=True)
def _loop(nodes: Any, resources: Any, runs: Any, counters: Any, seed: int, margin: int) -> int:
    """Process events until there are none, or until the runs' arrays might be full."""
    room = runs.node.size
    num_links = resources.gbps.size
    while True:
        if counters[NUM_RUNS] + margin > room:
            return FULL
        waiting = counters[NUM_EVENTS_WAITING]
        link_time = resources.links_time[0] if num_links else FOREVER
        if waiting == 0 and link_time == FOREVER:
            return DONE
        counters[NUM_EVENTS] += 1
        if (
            waiting == 0
            or link_time < runs.event_time[0]
            or (link_time == runs.event_time[0] and resources.links_key[0] < runs.event_key[0])
        ):
            _through(nodes, resources, runs, counters, seed, resources.links_item[0], link_time)
            continue
        time = runs.event_time[0]
        item = event_pop(runs.event_time, runs.event_key, runs.event_item, waiting)
        counters[NUM_EVENTS_WAITING] = waiting - 1
        if item & 1:
            _arrive(nodes, resources, runs, counters, seed, item >> 1, time)
        else:
            _end(nodes, resources, runs, counters, seed, item >> 1, time)


@njit(cache=True)
def _key(counters: Any, seed: int, rank: int) -> int:
    """The order of an event among those of its time: rank, or a random number, and then sequence."""
    sequence = counters[SEQUENCE]
    counters[SEQUENCE] = sequence + 1
    high = np.int64(rank)
    if seed != NONE:
        high = np.int64(_mix(np.uint64(sequence), np.uint64(seed)) & np.uint64(RANK_MASK))
    return (high << SEQUENCE_BITS) | sequence


@njit(cache=True)
def _mix(number: Any, seed: Any) -> Any:
    z = number + (seed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True)
def _schedule(nodes: Any, runs: Any, counters: Any, seed: int, run: int, arrived: int, time: int) -> None:
    key = _key(counters, seed, nodes.rank[runs.node[run]])
    waiting = counters[NUM_EVENTS_WAITING]
    event_push(runs.event_time, runs.event_key, runs.event_item, waiting, time, key, 2 * run + arrived)
    counters[NUM_EVENTS_WAITING] = waiting + 1


# ---- tasks and servers


@njit(cache=True)
def _ready(nodes: Any, resources: Any, runs: Any, counters: Any, seed: int, node: int, time: int) -> None:
    nodes.ready_ns[node] = time
    server = nodes.server[node]
    if server == NONE:
        _begin(nodes, runs, counters, seed, node, nodes.count[node], time)
        return
    nodes.queue_key[node] = (np.int64(nodes.priority[node]) << SEQUENCE_BITS) + counters[TURN]
    counters[TURN] += 1
    resources.queue_root[server] = push(
        nodes.queue_key, nodes.queue_child, nodes.queue_sibling, resources.queue_root[server], node
    )
    resources.queue_length[server] += 1
    _serve(nodes, resources, runs, counters, seed, server, time)
    resources.queue_peak[server] = max(resources.queue_peak[server], resources.queue_length[server])


@njit(cache=True)
def _serve(nodes: Any, resources: Any, runs: Any, counters: Any, seed: int, server: int, time: int) -> None:
    while resources.free[server] > 0 and resources.queue_root[server] != EMPTY:
        node = resources.queue_root[server]
        count = min(resources.free[server], np.int64(nodes.unstarted[node]))
        resources.free[server] -= count
        if count == nodes.unstarted[node]:
            resources.queue_root[server] = pop(nodes.queue_key, nodes.queue_child, nodes.queue_sibling, node)
            resources.queue_length[server] -= 1
        _begin(nodes, runs, counters, seed, node, count, time)


@njit(cache=True)
def _begin(nodes: Any, runs: Any, counters: Any, seed: int, node: int, count: int, time: int) -> None:
    if nodes.unstarted[node] == nodes.count[node]:
        nodes.start_ns[node] = time
    nodes.unstarted[node] -= count
    run = counters[NUM_RUNS]
    counters[NUM_RUNS] = run + 1
    runs.node[run] = node
    runs.count[run] = count
    runs.start_ns[run] = time
    runs.end_ns[run] = time + nodes.duration_ns[node]
    _schedule(nodes, runs, counters, seed, run, 0, runs.end_ns[run])


@njit(cache=True)
def _end(nodes: Any, resources: Any, runs: Any, counters: Any, seed: int, run: int, time: int) -> None:
    node = runs.node[run]
    server = nodes.server[node]
    if server != NONE:
        resources.free[server] += runs.count[run]
    if nodes.nbytes[node]:
        _send(nodes, resources, runs, counters, seed, run, time)
    elif nodes.latency_ns[node]:
        _schedule(nodes, runs, counters, seed, run, 1, time + nodes.latency_ns[node])
    else:
        _arrive(nodes, resources, runs, counters, seed, run, time)
    if server != NONE:
        _serve(nodes, resources, runs, counters, seed, server, time)


@njit(cache=True)
def _arrive(nodes: Any, resources: Any, runs: Any, counters: Any, seed: int, run: int, time: int) -> None:
    node = runs.node[run]
    nodes.undone[node] -= runs.count[run]
    if nodes.undone[node]:
        return
    nodes.done_ns[node] = time
    for edge in range(nodes.succ_start[node], nodes.succ_start[node + 1]):
        after = nodes.succ[edge]
        nodes.preds_left[after] -= 1
        if nodes.preds_left[after] == 0:
            nodes.cause[after] = node
            _ready(nodes, resources, runs, counters, seed, after, time)


# ---- links


@njit(cache=True)
def _send(nodes: Any, resources: Any, runs: Any, counters: Any, seed: int, run: int, time: int) -> None:
    node = runs.node[run]
    nbytes = runs.count[run] * nodes.nbytes[node]
    egress, ingress = nodes.egress[node], nodes.ingress[node]
    runs.paths_left[run] = (egress != NONE) + (ingress != NONE)
    if egress != NONE:
        _put(resources, runs, counters, seed, egress, 2 * run, nbytes, time)
    if ingress != NONE:
        _put(resources, runs, counters, seed, ingress, 2 * run + 1, nbytes, time)


@njit(cache=True)
def _put(resources: Any, runs: Any, counters: Any, seed: int, link: int, item: int, nbytes: int, time: int) -> None:
    _advance(resources, link, time)
    resources.nbytes[link] += nbytes
    runs.mark[item] = resources.served[link] + nbytes
    resources.root[link] = push(runs.mark, runs.mark_child, runs.mark_sibling, resources.root[link], item)
    resources.active[link] += 1
    resources.peak[link] = max(resources.peak[link], resources.active[link])
    _expect(resources, runs, counters, seed, link, time)


@njit(cache=True)
def _share(resources: Any, link: int) -> float:
    return min(resources.flow_gbps[link], resources.gbps[link] / resources.active[link])


@njit(cache=True)
def _advance(resources: Any, link: int, time: int) -> None:
    if resources.active[link]:
        passed = time - resources.since[link]
        resources.served[link] += passed * _share(resources, link)
        resources.busy_ns[link] += passed
    resources.since[link] = time


@njit(cache=True)
def _expect(resources: Any, runs: Any, counters: Any, seed: int, link: int, time: int) -> None:
    wait = (runs.mark[resources.root[link]] - resources.served[link]) / _share(resources, link)
    key = _key(counters, seed, resources.link_rank[link])
    _move_link(resources, link, time + max(np.int64(0), np.int64(ceil(wait))), key)


@njit(cache=True)
def _through(nodes: Any, resources: Any, runs: Any, counters: Any, seed: int, link: int, time: int) -> None:
    _advance(resources, link, time)
    gone = EMPTY  # a list of the items that are through, linked by `mark_child`, last first
    first = True
    while resources.root[link] != EMPTY:
        item = resources.root[link]
        if not first and runs.mark[item] > resources.served[link]:
            break
        first = False
        resources.root[link] = pop(runs.mark, runs.mark_child, runs.mark_sibling, item)
        resources.active[link] -= 1
        runs.mark_child[item] = gone
        gone = item
    if resources.active[link]:
        _expect(resources, runs, counters, seed, link, time)
    else:
        resources.served[link] = 0.0
        _move_link(resources, link, FOREVER, link)
    _deliver(nodes, runs, counters, seed, _reversed(runs.mark_child, gone), time)


@njit(cache=True)
def _reversed(following: Any, item: int) -> int:
    """The list turned round."""
    turned = EMPTY
    while item != EMPTY:
        rest = following[item]
        following[item] = turned
        turned, item = item, rest
    return turned


@njit(cache=True)
def _deliver(nodes: Any, runs: Any, counters: Any, seed: int, item: int, time: int) -> None:
    while item != EMPTY:
        run = item >> 1
        runs.paths_left[run] -= 1
        if runs.paths_left[run] == 0:
            _schedule(nodes, runs, counters, seed, run, 1, time + nodes.latency_ns[runs.node[run]])
        item = runs.mark_child[item]


@njit(cache=True)
def _earlier(resources: Any, a: int, b: int) -> bool:
    times, keys = resources.links_time, resources.links_key
    return bool(times[a] < times[b] or (times[a] == times[b] and keys[a] < keys[b]))


@njit(cache=True)
def _swap(resources: Any, a: int, b: int) -> None:
    for array in (resources.links_time, resources.links_key, resources.links_item):
        array[a], array[b] = array[b], array[a]
    resources.links_place[resources.links_item[a]] = a
    resources.links_place[resources.links_item[b]] = b


@njit(cache=True)
def _move_link(resources: Any, link: int, time: int, key: int) -> None:
    """Change the link's time and its place in the heap."""
    place = resources.links_place[link]
    resources.links_time[place] = time
    resources.links_key[place] = key
    while place > 0 and _earlier(resources, place, (place - 1) >> 1):
        _swap(resources, place, (place - 1) >> 1)
        place = (place - 1) >> 1
    size = resources.gbps.size
    while True:
        child = 2 * place + 1
        if child >= size:
            return
        if child + 1 < size and _earlier(resources, child + 1, child):
            child += 1
        if not _earlier(resources, child, place):
            return
        _swap(resources, place, child)
        place = child
