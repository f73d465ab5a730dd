"""The interpreted target: every thread of every block of every rank is a fiber under one deterministic scheduler.

A fiber (a greenlet) gives way only at a verb of the vocabulary: perhaps at a *step*, before and after an atomic access,
always while it polls, and at block barriers. A strategy decides at which steps, and who runs next: by default both are
drawn from a seed, so a run is replayed by its seed.

When every live fiber has polled again and again since the last write, no one can ever go on: `Deadlock` names each
fiber and its place in the source. Plain accesses take effect at once here (sequential consistency).
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from greenlet import getcurrent, greenlet

from reference.arrays import Array

QUIET_POLLS = 50
PLACE_DEPTH = 3
IS_VERB = True  # modules with this are verbs, not kernel code: places in the source leave them out


class Deadlock(RuntimeError):
    """No fiber can go on: each polls for something that nobody is left to write."""


class Block:
    """Fibers that share a barrier."""

    def __init__(self, name: str, lanes: int) -> None:
        self.name = name
        self.live = lanes
        self.waiting: list[Fiber] = []


class Fiber(greenlet):  # type: ignore[misc]  # greenlet has no types
    """One thread of a block, in one call; `name` is the same in every call."""

    def __init__(self, scheduler: Scheduler, block: Block, lane: int, lanes: int, body: Callable[[], object]) -> None:
        super().__init__(self._run, scheduler.hub)
        self.scheduler, self.block, self.lane, self.lanes, self.body = scheduler, block, lane, lanes, body
        self.name = f"{block.name} lane {lane}" if lanes > 1 else block.name
        self.actor: Any = None  # who it is in memory that is watched (explore/run/memory.py)
        self.polls = 0  # since the last write
        self.writes_seen = -1  # writes by anybody when the last poll began
        self.polls_in_vain = False  # known to find nothing until one of the words that it looked at is written

    @property
    def found_nothing(self) -> bool:
        """It looked at all that it waits for, and nobody has written since."""
        return self.polls > 0 and self.writes_seen == self.scheduler.writes

    def forget_polls_before_writes(self) -> None:
        if self.writes_seen != self.scheduler.writes:
            self.writes_seen, self.polls = self.scheduler.writes, 0

    def _run(self) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # compiled code is silent about them, too
            self.body()
        self.block.live -= 1
        self.scheduler.open_barrier_if_full(self.block)

    def place(self) -> str:
        """Where this fiber stands in the kernel's source: the innermost function first, then its callers."""
        names: list[str] = []
        frame = self.gr_frame
        while frame and len(names) < PLACE_DEPTH:
            if "IS_VERB" not in frame.f_globals:
                names.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            frame = frame.f_back
        return f"{self.block.name} lane {self.lane} at {' in '.join(names) or 'its start'}"


class Strategy(Protocol):
    """Who runs. It must depend on nothing but what it is told and its seed, so that a run can be replayed."""

    def added(self, fiber: Fiber) -> None:
        """A fiber is ready for the first time."""

    def take_next(self, ready: list[Fiber]) -> Fiber:
        """Remove the fiber that runs next from `ready`, which is not empty; fibers are put back at its end."""

    def switches(self, fiber: Fiber, ready: list[Fiber]) -> bool:
        """Does the running fiber give way at this step?"""


class RandomStrategy:
    """Any ready fiber is next with the same probability, and gives way at a step with probability `preempt`."""

    def __init__(self, seed: int, preempt: float = 0.3) -> None:
        self._draw, self._preempt = random.Random(seed).random, preempt

    def added(self, fiber: Fiber) -> None:
        pass

    def take_next(self, ready: list[Fiber]) -> Fiber:
        i = int(self._draw() * len(ready))
        ready[i], ready[-1] = ready[-1], ready[i]
        return ready.pop()

    def switches(self, fiber: Fiber, ready: list[Fiber]) -> bool:
        return self._draw() < self._preempt


class Scheduler:
    """Runs fibers to the end.

    Args:
        seed: decides every switch.
        preempt: probability of a switch at an atomic access.
        max_switches: gives up with a RuntimeError beyond this (a livelock).
        strategy: decides every switch instead of `seed` and `preempt`.
        quiet_polls: fibers wait for ever if each has polled more often than that since the last write.
    """

    def __init__(
        self,
        seed: int = 0,
        preempt: float = 0.3,
        max_switches: int = 50_000_000,
        strategy: Strategy | None = None,
        quiet_polls: int = QUIET_POLLS,
    ) -> None:
        self.strategy = strategy or RandomStrategy(seed, preempt)
        self.gives_way = self.strategy.switches  # asked twice at every atomic access
        self.max_switches, self.quiet_polls = max_switches, quiet_polls
        self.ready: list[Fiber] = []
        self.live = 0
        self.switches = 0
        self.writes = 0
        self.hub = getcurrent()

    def add_block(self, name: str, kernel: Callable[..., object], args: Sequence[Any], lanes: int = 1) -> list[Fiber]:
        """A new block; returns its fibers."""
        block, fibers = Block(name, lanes), []
        self.live += lanes
        for lane in range(lanes):
            fiber = Fiber(self, block, lane, lanes, lambda: kernel(*args))
            self.strategy.added(fiber)
            fibers.append(fiber)
        self.ready += fibers
        return fibers

    def lose(self, fibers: Sequence[Fiber]) -> None:
        """None of these ever runs again: if the running one is among them, this does not return."""
        lost = [fiber for fiber in fibers if not fiber.dead]
        self.ready = [fiber for fiber in self.ready if fiber not in lost]
        self.live -= len(lost)
        if current() in lost:
            self.hub.switch()

    def run(self) -> None:
        """Run until every fiber has returned.

        Raises:
            Deadlock: naming every fiber and where it stands.
        """
        self.hub = getcurrent()
        while self.ready:
            fiber = self.strategy.take_next(self.ready)
            fiber.parent = self.hub
            fiber.switch()
            self.switches += 1
            if fiber.dead:
                self.live -= 1
            elif fiber.polls > self.quiet_polls and all(self._only_polls(other) for other in self.ready):
                raise Deadlock(self._report("every live thread polls and nobody writes"))
            if self.switches > self.max_switches:
                raise RuntimeError(self._report(f"still running after {self.switches} switches"))
        if self.live:
            raise Deadlock(f"{self.live} threads wait in a block barrier that never fills")

    def _only_polls(self, fiber: Fiber) -> bool:
        return fiber.found_nothing and fiber.polls > self.quiet_polls

    def open_barrier_if_full(self, block: Block) -> None:
        if block.waiting and len(block.waiting) == block.live:
            self.ready += block.waiting
            block.waiting = []

    def _report(self, why: str) -> str:
        return "\n  ".join([why, *(fiber.place() for fiber in self.ready)])


current: Callable[[], Fiber] = getcurrent  # the running fiber; asked too often for a function around it


def preempt() -> None:
    """Maybe let another fiber run."""
    fiber = getcurrent()  # twice at every atomic access: a call less is worth it
    scheduler = fiber.scheduler
    if scheduler.gives_way(fiber, scheduler.ready):
        scheduler.ready.append(fiber)
        scheduler.hub.switch()


def idle() -> None:
    """Let another fiber run, because this one found nothing to do."""
    fiber = current()
    scheduler = fiber.scheduler
    fiber.forget_polls_before_writes()
    fiber.polls += 1
    scheduler.ready.append(fiber)
    scheduler.hub.switch()
    fiber.forget_polls_before_writes()


def note_progress() -> None:
    """Something was written that a polling fiber may wait for."""
    current().scheduler.writes += 1


def block_barrier() -> None:
    fiber = current()
    if fiber.lanes == 1:
        return
    fiber.block.waiting.append(fiber)
    fiber.scheduler.open_barrier_if_full(fiber.block)
    fiber.scheduler.hub.switch()


def clock() -> int:
    return current().scheduler.switches


def memory_view(address: int, num_elements: int, dtype: np.dtype[Any]) -> Array:
    """Elements at an address; none at all may be anywhere."""
    if num_elements == 0:
        return np.empty(0, dtype)
    buffer: Any = (ctypes.c_char * (int(num_elements) * dtype.itemsize)).from_address(int(address))
    return np.frombuffer(buffer, dtype)


def bfloat16_bits(value: float) -> np.int16:
    """The bfloat16 nearest to a float32, as bits."""
    import ml_dtypes

    bits: np.int16 = np.float32(value).astype(ml_dtypes.bfloat16).view(np.int16)
    return bits
