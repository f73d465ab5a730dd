"""A run's schedule as a short list: a default order, and the choices that differ from it.

By default a fiber runs on until it pauses, waits at a barrier or ends; then the next one in the order in which fibers
were first added goes on, those that polled in vain after all others. A `Choice` says that at a certain point of one
fiber another fiber goes on instead. Points are counted for each fiber by itself, so that to leave out one choice moves
the points of others as little as can be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from ...device.fibers import Fiber, Strategy
from ..run.reports import Stopped


class Choice(NamedTuple):
    """At its point number `point`, `fiber` gives way to `next`."""

    fiber: str  # its name; "" at the beginning of the run
    point: int
    next: str


class _Points:
    """Where a run is: points passed by each fiber, who ran last, and who would follow by default."""

    def __init__(self) -> None:
        self._passed: Counter[str] = Counter()
        self._order: dict[str, int] = {}
        self.last = ""

    def added(self, fiber: Fiber) -> None:
        self._order.setdefault(fiber.name, len(self._order))

    def pass_one(self) -> tuple[str, int]:
        """The point at which the fiber that ran last is; it has passed it now."""
        self._passed[self.last] += 1
        return self.last, self._passed[self.last] - 1

    def follower(self, ready: list[Fiber]) -> Fiber:
        """Who goes on by default if the last one does not."""
        after = self._order.get(self.last, -1) + 1

        def rank(fiber: Fiber) -> tuple[int, int]:
            turns = (self._order[fiber.name] - after) % len(self._order)
            return fiber.polls if fiber.found_nothing else 0, turns

        return min(ready, key=rank)


class Scheduled:
    """A strategy: the default order, but for some choices. One that cannot be made is left out."""

    def __init__(self, choices: Iterable[Choice] = ()) -> None:
        self._choices = {(choice.fiber, choice.point): choice.next for choice in choices}
        self._at = _Points()
        self._next: Fiber | None = None

    def added(self, fiber: Fiber) -> None:
        self._at.added(fiber)

    def switches(self, fiber: Fiber, ready: list[Fiber]) -> bool:
        self._next = self._chosen(ready)
        return self._next is not None

    def take_next(self, ready: list[Fiber]) -> Fiber:
        fiber = self._next if self._next is not None else self._chosen(ready)
        if fiber is None:  # a greenlet that has not begun counts as False
            fiber = self._at.follower(ready)
        self._next = None
        ready.remove(fiber)
        self._at.last = fiber.name
        return fiber

    def _chosen(self, ready: list[Fiber]) -> Fiber | None:
        chosen = self._choices.get(self._at.pass_one())
        return next((fiber for fiber in ready if fiber.name == chosen), None) if chosen else None


class Recorded:
    """A strategy with its run's schedule: `Scheduled(recorded.choices)` makes the same run.

    Args:
        most_turns: the run is stopped after as many.
    """

    def __init__(self, strategy: Strategy, most_turns: int | None = None) -> None:
        self._strategy, self._most_turns = strategy, most_turns
        self._at = _Points()
        self._left: tuple[str, int] | None = None  # where the running fiber gave way
        self.choices: list[Choice] = []
        self.steps = self.turns = 0

    def added(self, fiber: Fiber) -> None:
        self._at.added(fiber)
        self._strategy.added(fiber)

    def switches(self, fiber: Fiber, ready: list[Fiber]) -> bool:
        self.steps += 1
        point, gives_way = self._at.pass_one(), self._strategy.switches(fiber, ready)
        self._left = point if gives_way else None
        return gives_way

    def take_next(self, ready: list[Fiber]) -> Fiber:
        if self.turns == self._most_turns:
            raise Stopped
        self.turns += 1
        default = self._at.last if self._left else self._at.follower(ready).name
        point = self._left or self._at.pass_one()
        fiber = self._strategy.take_next(ready)
        self._left, self._at.last = None, fiber.name
        if self._at.last != default:
            self.choices.append(Choice(*point, self._at.last))
        return fiber
