"""What an expert's owner cuts, and when: its packets arrive, its processors run dry, and nobody knows what will come.

A full tile is cut at once. Rows that do not fill one are held back while packets of their expert are missing; they are
cut when the last is here, or when a processor finds nothing to do and no packet of their expert has come for a while.
That depends on what the processors do, which depends on what was cut: so a rank's processors are played here, one
event after the other, with everything else that runs on them ready when it was ready in a simulation before.

Source: flashmoe_numba/kernel/subscriber.py. Leaves out: that experts which share a lane of the OS block settle as one,
that a lane settles for results as well, and packets without rows, for which the kernel waits, too.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from ..engine.graph import NONE, Array, TaskGraph
from ..engine.kinds import GEMM0, GEMM1
from ..engine.timeline import Timeline
from ..world.routing import SimRouting
from .cuts import Cut


class Packet(NamedTuple):
    """Rows that the OS block sees at a time; a rank's are in the order of time."""

    time: int
    source: int
    expert: int
    rows: int


class Work(NamedTuple):
    """Equal tasks that wait for nobody here."""

    ready: int
    priority: int
    number: int
    duration: int


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Args:
    slots: processors of the rank.
    tile_m: rows of a full tile.
    tiles: column tiles of either product.
    tile_ns: of either product, by expert and rows: what a column tile takes.
    poll_ns: from when the OS block looks at a packet until it has seen its rows.
    settle_ns: no packet of an expert for so long: what is to come together is here.
    hand_ns: the OS block's time for handing out a row tile.
    """

    slots: int
    tile_m: int
    tiles: tuple[int, int]
    tile_ns: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]
    poll_ns: int
    settle_ns: int
    hand_ns: int


def cut_as_they_arrive(packets: Sequence[Packet], others: Iterable[Work], rules: Rules) -> list[Cut]:
    """The cuts of one rank, in the order of time."""
    owner = _Owner(packets, rules)
    for work in others:
        owner.at(work.ready, owner.queue_up, work.priority, work.number, work.duration, None)
    for packet in packets:
        owner.at(packet.time, owner.arrive, packet)
    owner.play()
    return owner.cuts


def cuts_of_all(
    routing: SimRouting, graph: TaskGraph, timeline: Timeline, received: Array, sm: Array, rules: Rules
) -> tuple[Array, list[Cut]]:
    """What the owners would have cut in this timeline; and `[num_ranks, num_experts]` by turn: whose packets came when.

    Args:
        received: `[num_ranks, num_experts]`, the node with which the OS block has seen each packet that has rows.
        sm: `[num_ranks]`, the servers of the processors.
    """
    source, expert = np.nonzero(routing.counts)
    nodes = received[source, expert]
    seen_ns = timeline.start_ns[nodes] + rules.poll_ns
    by_time = np.lexsort((nodes, seen_ns))
    turn = np.full(routing.counts.shape, len(by_time))
    turn[source[by_time], expert[by_time]] = np.arange(len(by_time))
    fields = seen_ns, source, expert, routing.counts[source, expert]
    packets: list[list[Packet]] = [[] for _ in sm]
    for packet in np.stack(fields)[:, by_time].T.tolist():
        packets[routing.owner[packet[2]]].append(Packet._make(packet))
    cuts: list[Cut] = []
    for server, of_rank in zip(sm.tolist(), packets, strict=True):
        cuts += cut_as_they_arrive(of_rank, _others(graph, timeline, server), rules)
    return np.argsort(turn, axis=0, kind="stable"), cuts


def _others(graph: TaskGraph, timeline: Timeline, server: int) -> list[Work]:
    """What processors do beside products."""
    nodes = graph.nodes
    mine = np.flatnonzero((nodes["server"] == server) & (nodes["kind"] != GEMM0) & (nodes["kind"] != GEMM1))
    fields = timeline.ready_ns[mine], *(nodes[name][mine] for name in ("priority", "count", "duration_ns"))
    return [Work._make(work) for work in np.stack(fields).T.tolist()]


@dataclass(slots=True)
class _Stream:
    missing: int = 0  # packets
    waiting: int = 0  # rows
    dealt_ns: int = 0  # when the last packet was dealt with, and tiles that it cut handed out


class _Owner:
    def __init__(self, packets: Sequence[Packet], rules: Rules) -> None:
        self.rules = rules
        self.cuts: list[Cut] = []
        self.streams = {expert: _Stream() for expert in sorted({packet.expert for packet in packets})}
        for packet in packets:
            self.streams[packet.expert].missing += 1
        self.uncut = sum(packet.rows for packet in packets)
        self.free = rules.slots
        self.promised = 0  # tasks that are cut, and still to be handed out
        self.time = 0
        self.events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self.queue: list[tuple[int, int, list[Any]]] = []  # heap of (priority, turn, [count, duration, undone, then])
        self.sequence = count()

    def at(self, time: int, what: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.events, (time, next(self.sequence), what, args))

    def play(self) -> None:
        """Until all rows are cut: no more is asked."""
        while self.uncut:
            self.time, _, what, args = heapq.heappop(self.events)
            what(*args)
            if not self.events or self.events[0][0] > self.time:
                self.cut_rests()

    # ---- the OS block

    def arrive(self, packet: Packet) -> None:
        stream = self.streams[packet.expert]
        stream.missing -= 1
        stream.waiting += packet.rows
        least = self.rules.tile_m if stream.missing else 1
        number = -(-(stream.waiting - least + 1) // self.rules.tile_m) if stream.waiting >= least else 0
        stream.dealt_ns = self.time + number * self.rules.hand_ns
        for _ in range(number):
            self.cut(packet.expert, NONE, stream.dealt_ns)
        if stream.waiting:
            self.at(stream.dealt_ns + self.rules.settle_ns, self.look)

    def look(self) -> None:
        """Rests are looked at after every event."""

    def cut_rests(self) -> None:
        """Whoever has nothing to do gets what waits."""
        for expert, stream in self.streams.items() if self.free > self.promised else ():
            settled = self.time >= stream.dealt_ns + self.rules.settle_ns
            if stream.waiting and settled and self.free > self.promised:
                ready_ns = self.time + self.rules.hand_ns
                self.cut(expert, ready_ns - stream.dealt_ns, ready_ns)

    def cut(self, expert: int, held_ns: int, ready_ns: int) -> None:
        stream = self.streams[expert]
        rows = min(stream.waiting, self.rules.tile_m)
        stream.waiting -= rows
        self.uncut -= rows
        self.cuts.append(Cut(expert, rows, held_ns))
        self.promised += self.rules.tiles[0]
        self.at(ready_ns, self.hand_out, expert, rows)

    def hand_out(self, expert: int, rows: int) -> None:
        self.promised -= self.rules.tiles[0]
        self.multiply(0, expert, rows)

    # ---- processors

    def multiply(self, product: int, expert: int, rows: int) -> None:
        then = (lambda: self.multiply(1, expert, rows)) if product == 0 else None
        self.queue_up(0, self.rules.tiles[product], self.rules.tile_ns[product][expert][rows], then)

    def queue_up(self, priority: int, number: int, duration: int, then: Callable[[], None] | None) -> None:
        heapq.heappush(self.queue, (priority, next(self.sequence), [number, duration, number, then]))
        self.serve()

    def serve(self) -> None:
        while self.free and self.queue:
            task = self.queue[0][2]
            number = min(self.free, task[0])
            self.free -= number
            task[0] -= number
            if not task[0]:
                heapq.heappop(self.queue)
            self.at(self.time + task[1], self.end, task, number)

    def end(self, task: list[Any], number: int) -> None:
        self.free += number
        task[2] -= number
        if not task[2] and task[3]:
            task[3]()
        self.serve()
