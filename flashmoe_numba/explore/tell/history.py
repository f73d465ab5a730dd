"""What happened in a run: every access to memory in order, and the turns that fibers took.

Plain accesses are seen only where the memory notes places, so a history is taken from a run with places.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType

import numpy as np

from ...device.fibers import Fiber, Strategy
from ..run.memory import LOADS, Access, Actor, Memory, Region
from ..run.reports import Report, kernel_frame
from ..run.reports import place as place_of
from ..run.world import WatchedWorld

IS_VERB = True  # kernel_frame passes over it


@dataclass(eq=False)
class Event:
    """One access. A plain one is `reads` or `writes`."""

    actor: Actor
    verb: str
    atomic: bool
    region: Region
    i: int
    value: int | None  # what was read, or is there afterwards; of integers only
    newest: int | None  # what another load could have read
    code: CodeType
    instruction: int

    @property
    def is_late(self) -> bool:
        """A load that read something else than the newest store."""
        return self.atomic and self.verb in LOADS and self.value != self.newest

    @property
    def where(self) -> str:
        """`function:line`"""
        return place_of(self.code, self.instruction)


@dataclass(eq=False)
class Turn:
    """What one fiber did until another one went on."""

    events: list[Event]
    paused: bool = False  # it ended because the fiber found nothing to do
    gave_way: bool = False  # it ended in the middle of something


class Recorder:
    """A strategy that is told of accesses, too: `turns` are the run's, up to a report if one is given."""

    def __init__(self, strategy: Strategy, memory: Memory, until: Report | None = None) -> None:
        self._strategy, self._memory, self._until = strategy, memory, until
        self._running: Fiber | None = None
        self.turns = [Turn([])]
        self.done = False
        memory.listener, memory.plain_listener = self._atomic, self._plain

    # ---- turns

    def added(self, fiber: Fiber) -> None:
        self._strategy.added(fiber)

    def switches(self, fiber: Fiber, ready: list[Fiber]) -> bool:
        gives_way = self._strategy.switches(fiber, ready)
        self.turns[-1].gave_way = gives_way
        return gives_way

    def take_next(self, ready: list[Fiber]) -> Fiber:
        turn = self.turns[-1]
        turn.paused = not turn.gave_way and any(fiber is self._running for fiber in ready)
        self._running = self._strategy.take_next(ready)
        if not self.done:
            self.turns.append(Turn([]))
        return self._running

    # ---- accesses

    def _atomic(self, actor: Actor, verb: str, region: Region, i: int, value: int) -> None:
        """An atomic access is judged before it is told: the report may be of this one or of the one before."""
        frame, reported = kernel_frame(sys._getframe(1)), self._until in self._memory.reports
        if not reported or (self._until is not None and self._until.cell == (region.name, i)):
            self._note(Event(actor, verb, True, region, i, value, int(region.cells[i]), frame.f_code, frame.f_lasti))
        self.done = self.done or reported

    def _plain(self, access: Access, verb: str, region: Region, i: int) -> None:
        """A plain access is told before it is judged."""
        self.done = self.done or self._until in self._memory.reports
        actor, _, code, instruction = access
        assert code is not None  # places are noted
        self._note(Event(actor, verb, False, region, i, None, None, code, instruction))

    def _note(self, event: Event) -> None:
        self._see_last_value()
        if not self.done:
            self.turns[-1].events.append(event)

    def _see_last_value(self) -> None:
        """A plain write takes effect after it was told."""
        events = self.turns[-1].events
        if events and events[-1].value is None and np.issubdtype(events[-1].region.dtype, np.integer):
            events[-1].value = int(events[-1].region.cells[events[-1].i])


def turns_until(
    world: WatchedWorld, make: Callable[[], Strategy], late_seed: int | None, until: Report | None
) -> list[Turn]:
    """The turns of this strategy's run, up to the access that brought the report."""
    try:
        run = world.run(lambda: Recorder(make(), world.memory, until), late_seed, with_places=True)
    finally:
        world.memory.listener = world.memory.plain_listener = None
    return [turn for turn in run.strategy.turns if turn.events]
