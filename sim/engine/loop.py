"""The event loop of `compiled.py`, compiled: what happens at each event, on arrays of records.

Functions named like a method of `plain.py` follow it; the others keep queues and heaps, which Python has, and numbers
in place of its objects.
"""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

import numpy as np

from .graph import NONE, Array
from .heaps import EMPTY, compiled, entry, event_pop, event_push, heap_dtype, pop, push
from .plain import RANK_MASK

SEQUENCE_BITS = 40
NUM_RUNS, NUM_STARTED, FREE_RUN, KEEP_RUNS, NUM_WAITING, SEQUENCE, TURN, NUM_EVENTS, SEED = range(9)
FIRST_MEMORY, NUM_COUNTERS = 9, 10  # of the links, those from there on are the ranks' memories
DONE, FULL = range(2)
FOREVER = np.iinfo(np.int64).max

GIVEN = ("rank", "server", "priority", "egress", "ingress", "count", "duration_ns", "streamed", "nbytes", "latency_ns")
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


class State(NamedTuple):
    """Everything the loop works on; the runs' arrays are `runs`, `marks` and `events`."""

    nodes: Array
    succ: Array
    servers: Array
    links: Array
    expected: Array  # heap of links by the end of their next transfer
    counters: Array
    runs: Array
    marks: Array
    events: Array

    def longer(self) -> State:
        """The same with twice the room for runs."""
        names = ("runs", "marks", "events")
        return self._replace(**{name: np.resize(getattr(self, name), 2 * len(getattr(self, name))) for name in names})


@entry
def start(s: State) -> None:
    for node in range(s.nodes.size):
        if s.nodes[node].preds_left == 0:
            _ready(s, node, 0)


@entry
def loop(s: State, margin: int) -> int:
    """Process events until there are none, or until the runs' arrays might be full."""
    while s.counters[NUM_RUNS] + margin <= s.runs.size:
        waiting = s.counters[NUM_WAITING]
        link = s.expected[0]
        if waiting == 0 and link.time == FOREVER:
            return DONE
        s.counters[NUM_EVENTS] += 1
        if waiting == 0 or _earlier(link, s.events[0]):
            _through(s, link.item, link.time)
            continue
        time = s.events[0].time
        item = event_pop(s.events, waiting)
        s.counters[NUM_WAITING] = waiting - 1
        run = item >> 1
        if item & 1:
            _arrive(s, run, time)
        else:
            _end(s, run, time)
    return FULL


@compiled
def _key(s: State, rank: int) -> Any:
    """The order of an event among those of its time: by rank, or a random number, and then by sequence."""
    sequence = s.counters[SEQUENCE]
    s.counters[SEQUENCE] = sequence + 1
    high = np.int64(rank)
    if s.counters[SEED] != NONE:
        high = np.int64(_mix(np.uint64(sequence), np.uint64(s.counters[SEED])) & np.uint64(RANK_MASK))
    return (high << SEQUENCE_BITS) | sequence


@compiled
def _mix(number: Any, seed: Any) -> Any:
    """`plain.mix`."""
    z = number + (seed + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def _schedule(s: State, run: int, arrived: int, time: int) -> None:
    key = _key(s, s.nodes[s.runs[run].node].rank)
    event_push(s.events, s.counters[NUM_WAITING], time, key, 2 * run + arrived)
    s.counters[NUM_WAITING] += 1


# ---- tasks and servers


@compiled
def _ready(s: State, node: int, time: int) -> None:
    s.nodes[node].ready_ns = time
    index = s.nodes[node].server
    if index == NONE:
        _begin(s, node, s.nodes[node].count, time)
        return
    _enqueue(s, index, node)
    _serve(s, index, time)
    s.servers[index].peak = max(s.servers[index].peak, s.servers[index].length)


@compiled
def _enqueue(s: State, index: int, node: int) -> None:
    """Nodes mostly come in the order in which they go: those are a list, and only the others are put into a heap."""
    turn = s.counters[TURN]
    s.counters[TURN] += 1
    s.servers[index].length += 1
    tail = s.servers[index].tail
    if s.servers[index].head != EMPTY and s.nodes[node].priority < s.nodes[tail].priority:
        s.servers[index].root = push(s.nodes, s.servers[index].root, node, s.nodes[node].priority, turn)
        return
    s.nodes[node].key = s.nodes[node].priority
    s.nodes[node].sibling = EMPTY
    if s.servers[index].head == EMPTY:
        s.servers[index].head = node
    else:
        s.nodes[tail].sibling = node
    s.servers[index].tail = node


@compiled
def _first(s: State, index: int) -> int:
    """The node that is next, of a queue that has some.

    A node in the heap came when the list ended with a larger key, so of the list what has its key was there before it.
    """
    head: int = s.servers[index].head
    root: int = s.servers[index].root
    if head == EMPTY:
        return root
    if root == EMPTY:
        return head
    return root if s.nodes[root].key < s.nodes[head].key else head


@compiled
def _dequeue(s: State, index: int, node: int) -> None:
    s.servers[index].length -= 1
    if node == s.servers[index].head:
        s.servers[index].head = s.nodes[node].sibling
    else:
        s.servers[index].root = pop(s.nodes, node)


@compiled
def _serve(s: State, index: int, time: int) -> None:
    """Give the free slots to what waits."""
    while s.servers[index].free > 0 and s.servers[index].length > 0:
        node = _first(s, index)
        count = min(s.servers[index].free, np.int64(s.nodes[node].unstarted))
        s.servers[index].free -= count
        if count == s.nodes[node].unstarted:
            _dequeue(s, index, node)
        _begin(s, node, count, time)


@compiled
def _begin(s: State, node: int, count: int, time: int) -> None:
    if s.nodes[node].unstarted == s.nodes[node].count:
        s.nodes[node].start_ns = time
    s.nodes[node].unstarted -= count
    run = s.counters[FREE_RUN]
    if run == NONE:
        run = s.counters[NUM_RUNS]
        s.counters[NUM_RUNS] = run + 1
    else:
        s.counters[FREE_RUN] = s.runs[run].node
    s.runs[run].turn = s.counters[NUM_STARTED]
    s.counters[NUM_STARTED] += 1
    end = time + s.nodes[node].duration_ns
    s.runs[run].node = node
    s.runs[run].count = count
    s.runs[run].start_ns = time
    s.runs[run].end_ns = end
    streamed = s.nodes[node].streamed
    if streamed:
        _put(s, s.counters[FIRST_MEMORY] + s.nodes[node].rank, 2 * run, streamed, s.runs[run].turn, time)
    else:
        _schedule(s, run, 0, end)


@compiled
def _end(s: State, run: int, time: int) -> None:
    node = s.runs[run].node
    index = s.nodes[node].server
    if index != NONE:
        s.servers[index].free += s.runs[run].count
    if s.nodes[node].nbytes:
        _send(s, run, time)
    elif s.nodes[node].latency_ns:
        _schedule(s, run, 1, time + s.nodes[node].latency_ns)
    else:
        _arrive(s, run, time)
    if index != NONE:
        _serve(s, index, time)


@compiled
def _arrive(s: State, run: int, time: int) -> None:
    node = s.runs[run].node
    s.runs[run].arrive_ns = time
    s.nodes[node].undone -= s.runs[run].count
    if not s.counters[KEEP_RUNS]:
        s.runs[run].node = s.counters[FREE_RUN]  # a list of places
        s.counters[FREE_RUN] = run
    if s.nodes[node].undone > 0:
        return
    s.nodes[node].done_ns = time
    for edge in range(s.nodes[node].succ_start, s.nodes[node].succ_end):
        after = s.succ[edge]
        s.nodes[after].preds_left -= 1
        if s.nodes[after].preds_left == 0:
            s.nodes[after].cause = node
            _ready(s, after, time)


# ---- links


@compiled
def _send(s: State, run: int, time: int) -> None:
    node = s.runs[run].node
    nbytes = s.runs[run].count * s.nodes[node].nbytes
    egress, ingress = s.nodes[node].egress, s.nodes[node].ingress
    s.runs[run].paths_left = (egress != NONE) + (ingress != NONE)
    if egress != NONE:
        _put(s, egress, 2 * run, nbytes, s.runs[run].turn, time)
    if ingress != NONE:
        _put(s, ingress, 2 * run + 1, nbytes, s.runs[run].turn, time)


@compiled
def _tasks_on(s: State, link: int, item: int) -> Any:
    return np.int64(1) if link < s.counters[FIRST_MEMORY] else np.int64(s.runs[item >> 1].count)


@compiled
def _put(s: State, link: int, item: int, nbytes: int, turn: int, time: int) -> None:
    _advance(s, link, time)
    s.links[link].nbytes += nbytes
    s.links[link].root = push(s.marks, s.links[link].root, item, s.links[link].served + nbytes, turn)
    s.links[link].active += _tasks_on(s, link, item)
    s.links[link].peak = max(s.links[link].peak, s.links[link].active)
    _expect(s, link, time)


@compiled
def _share(s: State, link: int) -> Any:
    return min(s.links[link].flow_gbps, s.links[link].gbps / s.links[link].active)


@compiled
def _advance(s: State, link: int, time: int) -> None:
    if s.links[link].active:
        passed = time - s.links[link].since
        s.links[link].served += passed * _share(s, link)
        s.links[link].busy_ns += passed
    s.links[link].since = time


@compiled
def _expect(s: State, link: int, time: int) -> None:
    wait = ceil((s.marks[s.links[link].root].key - s.links[link].served) / _share(s, link))
    _move(s, link, time + max(np.int64(0), np.int64(wait)), _key(s, s.links[link].rank))


@compiled
def _through(s: State, link: int, time: int) -> None:
    _advance(s, link, time)
    last = first = s.links[link].root  # those that are through, a list linked by `child`
    s.links[link].root = pop(s.marks, first)
    s.links[link].active -= _tasks_on(s, link, first)
    while s.links[link].root != EMPTY and s.marks[s.links[link].root].key <= s.links[link].served:
        item = s.links[link].root
        s.links[link].root = pop(s.marks, item)
        s.links[link].active -= _tasks_on(s, link, item)
        s.marks[last].child = item
        last = item
    s.marks[last].child = EMPTY
    if s.links[link].active:
        _expect(s, link, time)
    else:
        s.links[link].served = 0.0
        _move(s, link, FOREVER, link)
    while first != EMPTY:
        run = first >> 1
        if link < s.counters[FIRST_MEMORY]:
            _sent(s, run, time)
        else:
            s.runs[run].end_ns = max(s.runs[run].end_ns, time)
            _schedule(s, run, 0, s.runs[run].end_ns)
        first = s.marks[first].child


@compiled
def _sent(s: State, run: int, time: int) -> None:
    s.runs[run].paths_left -= 1
    if s.runs[run].paths_left == 0:
        _schedule(s, run, 1, time + s.nodes[s.runs[run].node].latency_ns)


@compiled
def _earlier(one: Any, other: Any) -> Any:
    """Of two events."""
    return one.time < other.time or (one.time == other.time and one.key < other.key)


@compiled
def _swap(s: State, a: int, b: int) -> None:
    time, key, item = s.expected[a].time, s.expected[a].key, s.expected[a].item
    s.expected[a] = s.expected[b]
    s.expected[b].time, s.expected[b].key, s.expected[b].item = time, key, item
    s.links[s.expected[a].item].place = a
    s.links[item].place = b


@compiled
def _move(s: State, link: int, time: Any, key: int) -> None:
    """Give the link another time, and the place in the heap that goes with it."""
    place = s.links[link].place
    s.expected[place].time = time
    s.expected[place].key = key
    while place > 0 and _earlier(s.expected[place], s.expected[(place - 1) >> 1]):
        _swap(s, place, (place - 1) >> 1)
        place = (place - 1) >> 1
    while True:
        child = 2 * place + 1
        if child >= s.expected.size:
            return
        if child + 1 < s.expected.size and _earlier(s.expected[child + 1], s.expected[child]):
            child += 1
        if not _earlier(s.expected[child], s.expected[place]):
            return
        _swap(s, place, child)
        place = child
