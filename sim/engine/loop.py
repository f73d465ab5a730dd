"""The event loop of `compiled.py`, compiled: what happens at each event, on arrays of records.

Functions take the arrays that they touch. Those named like a method of `plain.py` follow it; the others keep queues
and heaps, which Python has, and numbers in place of its objects.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np

from .graph import NONE
from .heaps import EMPTY, compiled, entry, event_pop, event_push, heap_dtype, pop, push
from .plain import RANK_MASK

SEQUENCE_BITS = 40
NUM_RUNS, NUM_STARTED, FREE_RUN, KEEP_RUNS, NUM_WAITING, SEQUENCE, TURN, NUM_EVENTS, SEED, NUM_COUNTERS = range(10)
DONE, FULL = range(2)
FOREVER = np.iinfo(np.int64).max

GIVEN = ("rank", "server", "priority", "egress", "ingress", "count", "duration_ns", "nbytes", "latency_ns")
TIMES = ("ready_ns", "start_ns", "done_ns")
HEAP = heap_dtype(np.int64)  # a node is an item of its server's queue
NODE = np.dtype(
    [(name, np.int32) for name in (*GIVEN[:6], "preds_left", "unstarted", "undone", "cause")]
    + [(name, np.int64) for name in (*GIVEN[6:], *TIMES, "succ_start", "succ_end", *(HEAP.names or ()))]
)
SERVER = np.dtype([(name, np.int64) for name in ("free", "head", "tail", "root", "length", "peak")])
LINK = np.dtype(
    [(name, np.float64) for name in ("gbps", "flow_gbps", "served")]
    + [(name, np.int64) for name in ("rank", "since", "active", "root", "nbytes", "busy_ns", "peak", "place")]
)
RUN = np.dtype(
    [(name, np.int32) for name in ("node", "count")]
    + [(name, np.int64) for name in ("start_ns", "end_ns", "arrive_ns", "turn", "paths_left")]
)
MARK = heap_dtype(np.float64)  # two per run, one for each of its links: item 2 run + side


@entry
def start(nodes: Any, servers: Any, counters: Any, runs: Any, events: Any) -> None:
    for node in range(nodes.size):
        if nodes[node].preds_left == 0:
            _ready(nodes, servers, counters, runs, events, node, 0)


@entry
def loop(
    nodes: Any, succ: Any, servers: Any, links: Any, expected: Any, counters: Any, runs: Any, marks: Any, events: Any,
    margin: int,
) -> int:  # fmt: skip
    """Process events until there are none, or until the runs' arrays might be full."""
    while counters[NUM_RUNS] + margin <= runs.size:
        waiting = counters[NUM_WAITING]
        link = expected[0]
        if waiting == 0 and link.time == FOREVER:
            return DONE
        counters[NUM_EVENTS] += 1
        if waiting == 0 or link.time < events[0].time or (link.time == events[0].time and link.key < events[0].key):
            _through(nodes, links, expected, counters, runs, marks, events, link.item, link.time)
            continue
        time = events[0].time
        item = event_pop(events, waiting)
        counters[NUM_WAITING] = waiting - 1
        run = item >> 1
        if item & 1:
            _arrive(nodes, succ, servers, counters, runs, events, run, time)
        else:
            _end(nodes, succ, servers, links, expected, counters, runs, marks, events, run, time)
    return FULL


@compiled
def _key(counters: Any, rank: int) -> Any:
    """The order of an event among those of its time: by rank, or a random number, and then by sequence."""
    sequence = counters[SEQUENCE]
    counters[SEQUENCE] = sequence + 1
    high = np.int64(rank)
    if counters[SEED] != NONE:
        high = np.int64(_mix(np.uint64(sequence), np.uint64(counters[SEED])) & np.uint64(RANK_MASK))
    return (high << SEQUENCE_BITS) | sequence


@compiled
def _mix(number: Any, seed: Any) -> Any:
    """`engine.mix`."""
    z = number + (seed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def _schedule(nodes: Any, counters: Any, runs: Any, events: Any, run: int, arrived: int, time: int) -> None:
    key = _key(counters, nodes[runs[run].node].rank)
    event_push(events, counters[NUM_WAITING], time, key, 2 * run + arrived)
    counters[NUM_WAITING] += 1


# ---- tasks and servers


@compiled
def _ready(nodes: Any, servers: Any, counters: Any, runs: Any, events: Any, node: int, time: int) -> None:
    nodes[node].ready_ns = time
    index = nodes[node].server
    if index == NONE:
        _begin(nodes, counters, runs, events, node, nodes[node].count, time)
        return
    _enqueue(nodes, servers, counters, index, node)
    _serve(nodes, servers, counters, runs, events, index, time)
    servers[index].peak = max(servers[index].peak, servers[index].length)


@compiled
def _enqueue(nodes: Any, servers: Any, counters: Any, index: int, node: int) -> None:
    """Nodes mostly come in the order in which they go: those are a list, and only the others are put into a heap."""
    turn = counters[TURN]
    counters[TURN] += 1
    servers[index].length += 1
    tail = servers[index].tail
    if servers[index].head != EMPTY and nodes[node].priority < nodes[tail].priority:
        servers[index].root = push(nodes, servers[index].root, node, nodes[node].priority, turn)
        return
    nodes[node].key = nodes[node].priority
    nodes[node].sibling = EMPTY
    if servers[index].head == EMPTY:
        servers[index].head = node
    else:
        nodes[tail].sibling = node
    servers[index].tail = node


@compiled
def _first(nodes: Any, servers: Any, index: int) -> int:
    """The node that is next, of a queue that has some.

    A node in the heap came when the list ended with a larger key, so of the list what has its key was there before it.
    """
    head: int = servers[index].head
    root: int = servers[index].root
    if head == EMPTY:
        return root
    if root == EMPTY:
        return head
    return root if nodes[root].key < nodes[head].key else head


@compiled
def _dequeue(nodes: Any, servers: Any, index: int, node: int) -> None:
    servers[index].length -= 1
    if node == servers[index].head:
        servers[index].head = nodes[node].sibling
    else:
        servers[index].root = pop(nodes, node)


@compiled
def _serve(nodes: Any, servers: Any, counters: Any, runs: Any, events: Any, index: int, time: int) -> None:
    """Give the free slots to what waits."""
    while servers[index].free > 0 and servers[index].length > 0:
        node = _first(nodes, servers, index)
        count = min(servers[index].free, np.int64(nodes[node].unstarted))
        servers[index].free -= count
        if count == nodes[node].unstarted:
            _dequeue(nodes, servers, index, node)
        _begin(nodes, counters, runs, events, node, count, time)


@compiled
def _begin(nodes: Any, counters: Any, runs: Any, events: Any, node: int, count: int, time: int) -> None:
    if nodes[node].unstarted == nodes[node].count:
        nodes[node].start_ns = time
    nodes[node].unstarted -= count
    run = counters[FREE_RUN]
    if run == NONE:
        run = counters[NUM_RUNS]
        counters[NUM_RUNS] = run + 1
    else:
        counters[FREE_RUN] = runs[run].node
    runs[run].turn = counters[NUM_STARTED]
    counters[NUM_STARTED] += 1
    end = time + nodes[node].duration_ns
    runs[run].node = node
    runs[run].count = count
    runs[run].start_ns = time
    runs[run].end_ns = end
    _schedule(nodes, counters, runs, events, run, 0, end)


@compiled
def _end(
    nodes: Any, succ: Any, servers: Any, links: Any, expected: Any, counters: Any, runs: Any, marks: Any, events: Any,
    run: int, time: int,
) -> None:  # fmt: skip
    node = runs[run].node
    index = nodes[node].server
    if index != NONE:
        servers[index].free += runs[run].count
    if nodes[node].nbytes:
        _send(nodes, links, expected, counters, runs, marks, run, time)
    elif nodes[node].latency_ns:
        _schedule(nodes, counters, runs, events, run, 1, time + nodes[node].latency_ns)
    else:
        _arrive(nodes, succ, servers, counters, runs, events, run, time)
    if index != NONE:
        _serve(nodes, servers, counters, runs, events, index, time)


@compiled
def _arrive(nodes: Any, succ: Any, servers: Any, counters: Any, runs: Any, events: Any, run: int, time: int) -> None:
    node = runs[run].node
    runs[run].arrive_ns = time
    nodes[node].undone -= runs[run].count
    if not counters[KEEP_RUNS]:
        runs[run].node = counters[FREE_RUN]  # a list of places
        counters[FREE_RUN] = run
    if nodes[node].undone > 0:
        return
    nodes[node].done_ns = time
    for edge in range(nodes[node].succ_start, nodes[node].succ_end):
        after = succ[edge]
        nodes[after].preds_left -= 1
        if nodes[after].preds_left == 0:
            nodes[after].cause = node
            _ready(nodes, servers, counters, runs, events, after, time)


# ---- links


@compiled
def _send(nodes: Any, links: Any, expected: Any, counters: Any, runs: Any, marks: Any, run: int, time: int) -> None:
    node = runs[run].node
    nbytes = runs[run].count * nodes[node].nbytes
    egress, ingress = nodes[node].egress, nodes[node].ingress
    runs[run].paths_left = (egress != NONE) + (ingress != NONE)
    if egress != NONE:
        _put(links, expected, counters, marks, egress, 2 * run, nbytes, runs[run].turn, time)
    if ingress != NONE:
        _put(links, expected, counters, marks, ingress, 2 * run + 1, nbytes, runs[run].turn, time)


@compiled
def _put(
    links: Any, expected: Any, counters: Any, marks: Any, link: int, item: int, nbytes: int, turn: int, time: int
) -> None:
    _advance(links, link, time)
    links[link].nbytes += nbytes
    links[link].root = push(marks, links[link].root, item, links[link].served + nbytes, turn)
    links[link].active += 1
    links[link].peak = max(links[link].peak, links[link].active)
    _expect(links, expected, counters, marks, link, time)


@compiled
def _share(links: Any, link: int) -> Any:
    return min(links[link].flow_gbps, links[link].gbps / links[link].active)


@compiled
def _advance(links: Any, link: int, time: int) -> None:
    if links[link].active:
        passed = time - links[link].since
        links[link].served += passed * _share(links, link)
        links[link].busy_ns += passed
    links[link].since = time


@compiled
def _expect(links: Any, expected: Any, counters: Any, marks: Any, link: int, time: int) -> None:
    wait = ceil((marks[links[link].root].key - links[link].served) / _share(links, link))
    _move(links, expected, link, time + max(np.int64(0), np.int64(wait)), _key(counters, links[link].rank))


@compiled
def _through(
    nodes: Any, links: Any, expected: Any, counters: Any, runs: Any, marks: Any, events: Any, link: int, time: int
) -> None:
    _advance(links, link, time)
    last = first = links[link].root  # those that are through, a list linked by `child`
    links[link].root = pop(marks, first)
    links[link].active -= 1
    while links[link].root != EMPTY and marks[links[link].root].key <= links[link].served:
        item = links[link].root
        links[link].root = pop(marks, item)
        links[link].active -= 1
        marks[last].child = item
        last = item
    marks[last].child = EMPTY
    if links[link].active:
        _expect(links, expected, counters, marks, link, time)
    else:
        links[link].served = 0.0
        _move(links, expected, link, FOREVER, link)
    while first != EMPTY:
        run = first >> 1
        runs[run].paths_left -= 1
        if runs[run].paths_left == 0:
            _schedule(nodes, counters, runs, events, run, 1, time + nodes[runs[run].node].latency_ns)
        first = marks[first].child


@compiled
def _earlier(expected: Any, a: int, b: int) -> Any:
    return expected[a].time < expected[b].time or (
        expected[a].time == expected[b].time and expected[a].key < expected[b].key
    )


@compiled
def _swap(links: Any, expected: Any, a: int, b: int) -> None:
    time, key, item = expected[a].time, expected[a].key, expected[a].item
    expected[a] = expected[b]
    expected[b].time, expected[b].key, expected[b].item = time, key, item
    links[expected[a].item].place = a
    links[item].place = b


@compiled
def _move(links: Any, expected: Any, link: int, time: Any, key: int) -> None:
    """Give the link another time, and the place in the heap that goes with it."""
    place = links[link].place
    expected[place].time = time
    expected[place].key = key
    while place > 0 and _earlier(expected, place, (place - 1) >> 1):
        _swap(links, expected, place, (place - 1) >> 1)
        place = (place - 1) >> 1
    while True:
        child = 2 * place + 1
        if child >= expected.size:
            return
        if child + 1 < expected.size and _earlier(expected, child + 1, child):
            child += 1
        if not _earlier(expected, child, place):
            return
        _swap(links, expected, place, child)
        place = child
