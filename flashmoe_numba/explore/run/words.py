"""Atomic words whose stores arrive late and out of order: what a load of one may read.

A word keeps its modification order: the stores to it, each with who made it and the clock that it released. A load may
read any of them but those that coherence and happens-before hide: older than a store that happens before the load, or
older than what a load that happens before it, or an earlier one of its own fiber, has read of this word. So two words
may be seen in different orders by different readers, while no reader sees one word go backwards. This is release and
acquire as in RC11 (Lahav, Vafeiadis, Kang, Hur, Dreyer, "Repairing Sequential Consistency in C/C++11", PLDI 2017)
without its fences and SC accesses, which the vocabulary has not, run step by step as a history of stores with a view of
each fiber (Kang, Hur, Lahav, Vafeiadis, Dreyer, "A Promising Semantics for Relaxed-Memory Concurrency", POPL 2017,
without promises). Which store is read is drawn at random, as in C11Tester (Luo and Demsky, ASPLOS 2021).

Leaves out: a store that takes its place in the modification order before one that was made earlier, so that of two
unordered stores to one word the later one loses; and loads that read what is stored later in the run (load buffering).
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

LATE = 0.25
"""How often a load that may be late is. A bug often wants one word new and another one old, which happens most often at
1/2; polls that are late only cost time, which speaks for less. 1/4 has three quarters of the former."""
MOST_LATE_POLLS = 8  # much less than device.fibers.QUIET_POLLS: who is said to wait for ever has looked at the newest

# One store: its value, by which entry of whose clock, the clock that it released, and when it was made.
Message = tuple[int, int, int, list[int], int]


class Word:
    """One word since the last plain store to it, with which all must be ordered anyhow.

    `messages` is its modification order, empty before the first atomic store; `writes` and `reads` are the last atomic
    accesses of each actor, by its index; `polled_by` are fibers that wait for a store.
    """

    __slots__ = ("_seen", "messages", "polled_by", "reads", "writes")

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.writes: dict[int, Any] = {}
        self.reads: dict[int, Any] = {}
        self.polled_by: set[Any] = set()
        self._seen: dict[int, list[tuple[int, int]]] = {}  # by reader: its clock's entry and the position; both grow

    def store(self, before: int, value: int, writer: int, clock: list[int], time: int) -> None:
        """`before` is what it held."""
        if not self.messages:
            self.messages.append((before, writer, 0, [], 0))  # happens before all
        self.messages.append((value, writer, clock[writer], clock, time))
        self.wake()

    def wake(self) -> None:
        """It has been stored to: polling again may find something."""
        for fiber in self.polled_by:
            fiber.polls_in_vain = False
        self.polled_by.clear()

    def load(self, reader: int, clock: list[int], draw: Callable[[], float] | None, arrived: int = -1) -> Message:
        """Read one of the messages that may be read: the newest without `draw`, which gives numbers in [0, 1).

        Stores made up to the time `arrived` are seen by everybody.
        """
        position = newest = len(self.messages) - 1
        if draw and draw() < LATE:
            position -= ceil(draw() * (newest - self._oldest(clock, arrived)))
        seen = self._seen.setdefault(reader, [])
        if not seen or seen[-1][1] < position:
            seen.append((clock[reader], position))
        return self.messages[position]

    def _oldest(self, clock: list[int], arrived: int) -> int:
        """Position of the oldest message that whoever has this clock may read."""
        oldest = len(self.messages) - 1
        while self.messages[oldest][2] > clock[self.messages[oldest][1]] and self.messages[oldest][4] > arrived:
            oldest -= 1
        for reader, seen in self._seen.items():
            oldest = max(oldest, next((at for entry, at in reversed(seen) if entry <= clock[reader]), 0))
        return oldest
