"""Strategies of the explorer beside the random one of device/fibers.py: who runs next, and where a fiber gives way.

A run is replayed by its strategy and seed. What steps and polls are is said in device/fibers.py.
"""

from __future__ import annotations

import random

from ...device.fibers import Fiber, RandomStrategy, Strategy

STRATEGIES = ("random", "pct", "round-robin")


class PctStrategy:
    """PCT: random priorities, and `depth - 1` random steps at which the running fiber's falls below all others'.

    The ready fiber of the highest priority runs, so a run has few switches, each where it may matter. With n fibers and
    k steps, a bug of depth d (one that shows as soon as d accesses happen in a certain order) is found by a run with
    probability of at least 1 / (n k^(d - 1)). Source: Burckhardt, Kothari, Musuvathi, Nagarakatte, "A Randomized
    Scheduler with Probabilistic Guarantees of Finding Bugs", ASPLOS 2010, sections 2 and 3.

    There a fiber that waits is blocked. Here it polls: while it found nothing and nobody has written since, or nobody
    one of the words that it looked at, it counts as blocked, and runs only if all others do. So polls starve nobody,
    and the bound holds with k the steps of the longest run, polls included.

    Args:
        num_steps: k, an estimate: change points are drawn from [1, num_steps].
        depth: d, at least 1.
    """

    def __init__(self, seed: int, num_steps: int, depth: int = 3) -> None:
        self._random = random.Random(seed)
        points = [self._random.randint(1, max(1, num_steps)) for _ in range(min(depth - 1, num_steps))]
        self._falls = {step: -1 - i for i, step in enumerate(sorted(points))}  # others are in [0, 1)
        self._priority: dict[Fiber, float] = {}
        self._known = (-1, -1)  # writes and ready fibers when the running one was last known to be the first
        self.steps = 0

    def added(self, fiber: Fiber) -> None:
        self._priority[fiber] = self._random.random()

    def take_next(self, ready: list[Fiber]) -> Fiber:
        fiber = max(ready, key=self._rank)
        ready.remove(fiber)
        self._known = fiber.scheduler.writes, len(ready)
        return fiber

    def switches(self, fiber: Fiber, ready: list[Fiber]) -> bool:
        self.steps += 1
        falls = self.steps in self._falls
        if falls:
            self._priority[fiber] = self._falls[self.steps]
        known = fiber.scheduler.writes, len(ready)
        if known == self._known and not falls:
            return False
        self._known = known
        mine = self._rank(fiber)
        return any(self._rank(other) > mine for other in ready)

    def _rank(self, fiber: Fiber) -> tuple[bool, float]:
        """Fibers that poll in vain come last, in turn: `ready` begins with whoever has waited longest."""
        idle = fiber.polls_in_vain or fiber.found_nothing
        return not idle, 0.0 if idle else self._priority[fiber]


class RoundRobinStrategy:
    """Whoever has waited longest is next, and gives way at every `quantum`-th step; the seed decides the first order.

    Quanta are 1 to 8 steps by seed, so that seeds differ in more than who begins.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._quantum = 1 + seed % 8
        self._shuffled = False
        self.steps = 0

    def added(self, fiber: Fiber) -> None:
        pass

    def take_next(self, ready: list[Fiber]) -> Fiber:
        if not self._shuffled:
            self._random.shuffle(ready)
            self._shuffled = True
        return ready.pop(0)

    def switches(self, fiber: Fiber, ready: list[Fiber]) -> bool:
        self.steps += 1
        return self.steps % self._quantum == 0


def make_strategy(name: str, seed: int, *, num_steps: int, depth: int) -> Strategy:
    """The strategy of that name; `num_steps` and `depth` are of PCT."""
    if name == "pct":
        return PctStrategy(seed, num_steps, depth)
    if name == "round-robin":
        return RoundRobinStrategy(seed)
    if name == "random":
        return RandomStrategy(seed)
    raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {name!r}")
