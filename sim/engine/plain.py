"""The event loop: the specification of what a `TaskGraph` means in time, in plain Python.

Events are processed in the order (time, rank, sequence): of two at the same nanosecond the lower rank's comes first,
and of one rank's the one that was scheduled first. With a `tie_seed`, events of the same time come in a random order
instead, which no count and no invariant may depend on.

- END of a run of tasks: its slots are free again, its bytes go on their path, and the server starts what waits. It
  comes after the tasks' duration; of tasks that stream not before their bytes are through the memory of their rank.
- LINK: a transfer of a link or memory is through. All transfers of a link progress alike, at `min(flow_gbps, gbps /
  number)` bytes per ns, so the link keeps one number, the bytes that each of them had since it was last idle, and each
  transfer ends when that number passes its own mark. A transfer over two links goes over both at once, at each one's
  pace, and has arrived when both are through: no link carries more than it can, and none waits for the other's. A
  memory is the same, but shared by tasks: a run of five counts five times.
- ARRIVE: tasks are complete; those of a node complete, its successors may become ready.

`compiled.py` means the same, compiled, event for event; a property test compares them.
Leaves out: work that is preempted, resources that fail.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import ceil

import numpy as np

from reference.scalars import plain

from .graph import NONE, TaskGraph
from .timeline import Timeline, check_complete

END, LINK, ARRIVE = range(3)
RANK_MASK = 2**23 - 1
MASK = 2**64 - 1


class Instrument:
    """Observer of a run: override what is of interest. Times in ns, nodes and links by index."""

    def on_ready(self, time: int, node: int) -> None:
        """All predecessors are complete."""

    def on_start(self, time: int, node: int, count: int) -> None:
        """`count` tasks took slots."""

    def on_end(self, time: int, node: int, count: int) -> None:
        """`count` tasks gave their slots back."""

    def on_transfer(self, time: int, node: int, link: int, nbytes: int) -> None:
        """Bytes were put on a link."""

    def on_done(self, time: int, node: int) -> None:
        """The node is complete."""


def mix(number: int, seed: int) -> int:
    """A random 64-bit number of this one (the finaliser of SplitMix64)."""
    z = (number + (seed + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def run(graph: TaskGraph, *, tie_seed: int | None = None, instruments: Sequence[Instrument] = ()) -> Timeline:
    """The timeline of a graph.

    Args:
        tie_seed: shuffle events of the same time by this seed, in [0, 2**63).
        instruments: told of everything that happens, in order.

    Raises:
        ValueError: no such seed. DeadlockError: a node can never run; says who waits for what.
    """
    engine = _Engine(graph, check_tie_seed(tie_seed), instruments)
    engine.start()
    engine.loop()
    check_complete(graph, engine.preds_left)
    return engine.timeline()


def check_tie_seed(tie_seed: int | None) -> int | None:
    """`tie_seed` as a Python integer, or None."""
    tie_seed = plain(tie_seed)
    if tie_seed is not None and not 0 <= tie_seed < 2**63:
        raise ValueError(f"tie_seed must be in [0, 2**63), got {tie_seed}")
    return tie_seed


class _Link:
    """The transfers under way on one link: `served` is the bytes that each has had since the link was last idle.

    Of a memory those of tasks, of which a transfer has several.
    """

    def __init__(self, rank: int, gbps: float, flow_gbps: float) -> None:
        self.rank = rank
        self.gbps = gbps
        self.flow_gbps = flow_gbps
        self.active = 0
        self.served = 0.0
        self.since = 0  # the time at which `served` was true
        self.marks: list[tuple[float, int]] = []  # heap of (served at which it is through, run)
        self.event: tuple[int, int, int] | None = None  # when the next transfer is through, as an event's key
        self.nbytes = 0
        self.busy_ns = 0
        self.peak = 0

    def share(self) -> float:
        return min(self.flow_gbps, self.gbps / self.active)

    def advance(self, time: int) -> None:
        if self.marks:
            self.served += (time - self.since) * self.share()
            self.busy_ns += time - self.since
        self.since = time


class _Engine:
    def __init__(self, graph: TaskGraph, tie_seed: int | None, instruments: Sequence[Instrument]) -> None:
        self.graph = graph
        self.tie_seed = tie_seed
        self.instruments = instruments
        nodes = graph.nodes
        self.rank: list[int] = nodes["rank"].tolist()
        self.count: list[int] = nodes["count"].tolist()
        self.server: list[int] = nodes["server"].tolist()
        self.priority: list[int] = nodes["priority"].tolist()
        self.duration_ns: list[int] = nodes["duration_ns"].tolist()
        self.nbytes: list[int] = nodes["nbytes"].tolist()
        self.paths: list[tuple[int, int]] = list(zip(nodes["egress"].tolist(), nodes["ingress"].tolist(), strict=True))
        self.latency_ns: list[int] = nodes["latency_ns"].tolist()
        self.preds_left = graph.num_preds.tolist()
        self.unstarted = list(self.count)
        self.undone = list(self.count)
        self.free = [server.slots for server in graph.servers]
        self.queues: list[list[tuple[int, int, int]]] = [[] for _ in graph.servers]  # heaps of (priority, turn, node)
        self.queue_peak = [0] * len(graph.servers)
        self.streamed: list[int] = nodes["streamed"].tolist()
        self.links = [_Link(link.rank, link.gbps, link.flow_gbps) for link in graph.links]
        self.num_links = len(self.links)
        if graph.memory is not None:
            self.links += [_Link(rank, *graph.memory) for rank in range(graph.num_memories)]
        self.turn = 0
        self.events: list[tuple[int, int, int, int, int]] = []  # heap of (time, rank, sequence, what, run or link)
        self.sequence = 0
        self.num_events = 0
        self.ready_ns = [0] * graph.num_nodes
        self.start_ns = [0] * graph.num_nodes
        self.done_ns = [0] * graph.num_nodes
        self.cause = [NONE] * graph.num_nodes
        self.runs: list[tuple[int, int, int, int]] = []  # (node, count, start, end)
        self.paths_left: list[int] = []  # of each run: links that its bytes are still on
        self.run_arrive_ns: list[int] = []

    def start(self) -> None:
        for node in range(self.graph.num_nodes):
            if self.preds_left[node] == 0:
                self.ready(node, 0)

    def loop(self) -> None:
        while self.events:
            time, rank, sequence, what, which = heapq.heappop(self.events)
            if what == LINK and self.links[which].event != (time, rank, sequence):
                continue  # a transfer came or went since, so its end was expected anew
            self.num_events += 1
            if what == END:
                self.end(which, time)
            elif what == LINK:
                self.through(which, time)
            else:
                self.arrive(which, time)

    def schedule(self, time: int, rank: int, what: int, which: int) -> tuple[int, int, int]:
        if self.tie_seed is not None:
            rank = mix(self.sequence, self.tie_seed) & RANK_MASK
        key = (time, rank, self.sequence)
        self.sequence += 1
        heapq.heappush(self.events, (*key, what, which))
        return key

    # ---- tasks and servers

    def ready(self, node: int, time: int) -> None:
        self.ready_ns[node] = time
        for instrument in self.instruments:
            instrument.on_ready(time, node)
        server = self.server[node]
        if server == NONE:
            self.begin(node, self.count[node], time)
            return
        heapq.heappush(self.queues[server], (self.priority[node], self.turn, node))
        self.turn += 1
        self.serve(server, time)
        self.queue_peak[server] = max(self.queue_peak[server], len(self.queues[server]))

    def serve(self, server: int, time: int) -> None:
        """Give the free slots to what waits."""
        queue = self.queues[server]
        while self.free[server] and queue:
            node = queue[0][2]
            count = min(self.free[server], self.unstarted[node])
            self.free[server] -= count
            if count == self.unstarted[node]:
                heapq.heappop(queue)
            self.begin(node, count, time)

    def begin(self, node: int, count: int, time: int) -> None:
        if self.unstarted[node] == self.count[node]:
            self.start_ns[node] = time
        self.unstarted[node] -= count
        for instrument in self.instruments:
            instrument.on_start(time, node, count)
        end = time + self.duration_ns[node]
        self.runs.append((node, count, time, end))
        self.paths_left.append(0)
        self.run_arrive_ns.append(0)
        if self.streamed[node]:
            self.put(self.num_links + self.rank[node], len(self.runs) - 1, self.streamed[node], time)
        else:
            self.schedule(end, self.rank[node], END, len(self.runs) - 1)

    def end(self, run: int, time: int) -> None:
        node, count, _, _ = self.runs[run]
        for instrument in self.instruments:
            instrument.on_end(time, node, count)
        server = self.server[node]
        if server != NONE:
            self.free[server] += count
        if self.nbytes[node]:
            self.send(run, time)
        elif self.latency_ns[node]:
            self.schedule(time + self.latency_ns[node], self.rank[node], ARRIVE, run)
        else:
            self.arrive(run, time)
        if server != NONE:
            self.serve(server, time)

    def arrive(self, run: int, time: int) -> None:
        node, count, _, _ = self.runs[run]
        self.run_arrive_ns[run] = time
        self.undone[node] -= count
        if self.undone[node]:
            return
        self.done_ns[node] = time
        for instrument in self.instruments:
            instrument.on_done(time, node)
        for after in self.graph.successors(node).tolist():
            self.preds_left[after] -= 1
            if self.preds_left[after] == 0:
                self.cause[after] = node
                self.ready(after, time)

    # ---- links

    def send(self, run: int, time: int) -> None:
        node, count, _, _ = self.runs[run]
        path = [link for link in self.paths[node] if link != NONE]
        self.paths_left[run] = len(path)
        for link in path:
            for instrument in self.instruments:
                instrument.on_transfer(time, node, link, count * self.nbytes[node])
            self.put(link, run, count * self.nbytes[node], time)

    def tasks_on(self, index: int, run: int) -> int:
        """As how many a run counts on a link or memory."""
        return 1 if index < self.num_links else self.runs[run][1]

    def put(self, index: int, run: int, nbytes: int, time: int) -> None:
        link = self.links[index]
        link.advance(time)
        link.nbytes += nbytes
        heapq.heappush(link.marks, (link.served + nbytes, run))
        link.active += self.tasks_on(index, run)
        link.peak = max(link.peak, link.active)
        self.expect(index, time)

    def expect(self, index: int, time: int) -> None:
        """Schedule the end of the link's next transfer."""
        link = self.links[index]
        wait = max(0, ceil((link.marks[0][0] - link.served) / link.share()))
        link.event = self.schedule(time + wait, link.rank, LINK, index)

    def through(self, index: int, time: int) -> None:
        """The link's next transfer is through, and others that end with it."""
        link = self.links[index]
        link.advance(time)
        runs = [heapq.heappop(link.marks)[1]]  # whatever rounding says: it was this one's time
        while link.marks and link.marks[0][0] <= link.served:
            runs.append(heapq.heappop(link.marks)[1])
        link.active -= sum(self.tasks_on(index, run) for run in runs)
        link.event = None
        if link.marks:
            self.expect(index, time)
        else:
            link.served = 0.0
        for run in runs:
            (self.sent if index < self.num_links else self.through_memory)(run, time)

    def sent(self, run: int, time: int) -> None:
        self.paths_left[run] -= 1
        if self.paths_left[run] == 0:
            node = self.runs[run][0]
            self.schedule(time + self.latency_ns[node], self.rank[node], ARRIVE, run)

    def through_memory(self, run: int, time: int) -> None:
        node, count, start, end = self.runs[run]
        self.runs[run] = node, count, start, max(end, time)
        self.schedule(max(end, time), self.rank[node], END, run)

    def timeline(self) -> Timeline:
        runs, links = np.array(self.runs, np.int64).reshape(-1, 4), self.links[: self.num_links]
        return Timeline(
            ready_ns=np.array(self.ready_ns, np.int64),
            start_ns=np.array(self.start_ns, np.int64),
            done_ns=np.array(self.done_ns, np.int64),
            cause=np.array(self.cause, np.int32),
            run_node=runs[:, 0].astype(np.int32),
            run_count=runs[:, 1].astype(np.int32),
            run_start_ns=runs[:, 2],
            run_end_ns=runs[:, 3],
            run_arrive_ns=np.array(self.run_arrive_ns, np.int64),
            link_bytes=np.array([link.nbytes for link in links], np.int64),
            link_busy_ns=np.array([link.busy_ns for link in links], np.int64),
            link_peak=np.array([link.peak for link in links], np.int64),
            queue_peak=np.array(self.queue_peak, np.int64),
            num_events=self.num_events,
        )
