"""Which interleavings an exhaustive search has yet to try: partial-order reduction by source sets and sleep sets.

Two events depend on each other if they touch one word and one of them writes it. Interleavings that differ only in the
order of independent events end alike, so one of each class is enough. After a run, every pair of dependent events with
nothing between them that orders them is tried the other way round, unless that is a class that has been seen. Source:
Abdulla, Aronis, Jonsson, Sagonas, "Optimal Dynamic Partial Order Reduction", POPL 2014, algorithm 1 (source-DPOR).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

WordName = Hashable  # whatever tells words apart: array and index
Look = tuple[WordName, int]  # a word, and how often it had been written


class Event(NamedTuple):
    """One atomic access."""

    thread: str
    word: WordName
    writes: bool

    def depends_on(self, other: Event) -> bool:
        return self.word == other.word and (self.writes or other.writes)


@dataclass
class Node:
    """A choice: the thread that runs from here until it has made one event.

    Args:
        event: None while it has not been seen yet.
        asleep: threads that need not run next from here, and what their next event is: all that begins with it has been
            tried, or is as good as something that has.
        to_try: threads that have to be tried from here, the tried ones included.
        rests: of threads that are in the midst of a poll after this event, what they have yet to look at (word, and how
            often it has been written), which will let the poll fail.
    """

    thread: str
    asleep: dict[str, Event]
    event: Event | None = None
    to_try: set[str] = field(default_factory=set)
    rests: dict[str, list[Look]] = field(default_factory=dict)

    def asleep_after(self) -> dict[str, Event]:
        """Who sleeps in the next node."""
        assert self.event is not None
        made = self.event
        return {t: event for t, event in self.asleep.items() if t != self.thread and not event.depends_on(made)}


class Order:
    """What happens before what in a run: a vector clock for each event.

    Args:
        events: of the run, in their order.
        parents: threads that had ended before a thread began.
    """

    def __init__(self, events: Sequence[Event], parents: Mapping[str, Sequence[str]]) -> None:
        self.events = events
        self.clocks: list[dict[str, int]] = []
        self.position: list[int] = []  # in its thread, from 1
        self.races: list[tuple[int, int]] = []  # dependent events of two threads, ordered by nothing else
        self._last: dict[str, dict[str, int]] = {}  # clock of a thread's last event
        self._writes: dict[WordName, int] = {}
        self._reads: dict[WordName, list[int]] = {}  # since the last write
        for i, event in enumerate(events):
            self._add(i, event, parents)

    def before(self, i: int, j: int) -> bool:
        """Does event i happen before event j?"""
        return self.clocks[j].get(self.events[i].thread, 0) >= self.position[i]

    def _add(self, i: int, event: Event, parents: Mapping[str, Sequence[str]]) -> None:
        thread, word = event.thread, event.word
        clock = self._last.get(thread)
        if clock is None:
            clock = _joined(self._last[parent] for parent in parents.get(thread, ()) if parent in self._last)
        touched = [self._writes[word]] if word in self._writes else []
        if event.writes:
            touched += self._reads.pop(word, [])
        new = [j for j in touched if clock.get(self.events[j].thread, 0) < self.position[j]]
        self.races += [(j, i) for j in new if not any(self.before(j, other) for other in new if other != j)]
        clock = _joined([clock, *(self.clocks[j] for j in new)])
        clock[thread] = clock.get(thread, 0) + 1
        self.position.append(clock[thread])
        self.clocks.append(clock)
        self._last[thread] = clock
        if event.writes:
            self._writes[word] = i
        else:
            self._reads.setdefault(word, []).append(i)

    def first_to_run(self, i: int, j: int) -> list[str]:
        """Threads that may run next where event i did, on the way to event j without event i."""
        rest = [k for k in range(i + 1, j) if not self.before(i, k)] + [j]
        seen: set[str] = set()
        initials = []
        for n, k in enumerate(rest):
            thread = self.events[k].thread
            if thread not in seen and not any(self.before(other, k) for other in rest[:n]):
                initials.append(thread)
            seen.add(thread)
        return initials


def _joined(clocks: Iterable[dict[str, int]]) -> dict[str, int]:
    joined: dict[str, int] = {}
    for clock in clocks:
        for thread, position in clock.items():
            if joined.get(thread, 0) < position:
                joined[thread] = position
    return joined


def add_reversals(nodes: Sequence[Node], order: Order, first_new: int) -> None:
    """Have the races that end in an event from `first_new` on tried the other way round."""
    for i, j in order.races:
        if j >= first_new:
            node, initials = nodes[i], order.first_to_run(i, j)
            if not any(thread in node.to_try or thread in node.asleep for thread in initials):
                last = order.events[j].thread
                node.to_try.add(last if last in initials else initials[0])


def next_branch(nodes: list[Node]) -> bool:
    """Cut the nodes down to the last that has something left to try, and turn it to that; False if none has."""
    while nodes:
        node = nodes[-1]
        if node.event is not None:
            node.asleep[node.thread] = node.event
        left = sorted(node.to_try - node.asleep.keys())
        if left:
            node.thread, node.event, node.rests = left[0], None, {}
            return True
        nodes.pop()
    return False
