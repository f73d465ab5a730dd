"""Every interleaving of a small world, up to the order of independent accesses: runs until the tree has no more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from ..device.fibers import Fiber, Strategy
from .choose.choice_tree import RETRY, ChoiceTree
from .choose.schedules import Recorded
from .run.checks import Checker
from .run.world import WatchedWorld
from .search import Outcome, Search, watched_kernel

EXHAUSTIVE = "exhaustive"  # beside strategies.STRATEGIES


def check_search(search: Search) -> None:
    """Raises ValueError where the tree would not hold everything."""
    needs = {
        "lanes": 1,
        "leavers": (),
        "deadline": None,
        "grid": False,
        "hosts": 1,
        "weak": False,
    }  # classes know no time
    for name, needed in needs.items():
        given = search.weak if name == "weak" else getattr(search.spec, name)
        if given != needed:
            raise ValueError(f"exhaustive search needs {name}={needed}, got {given}")


def explore_all(search: Search) -> Iterator[Outcome]:
    """An outcome for every class of interleavings, and for the runs it took besides; their seeds count them.

    Raises:
        ValueError: see `check_search`.
    """
    check_search(search)
    with watched_kernel(search.plant) as kernel:
        world = WatchedWorld(search.spec, kernel)
        checker, tree = Checker(world), ChoiceTree(world.memory, rank_of)
        number, start, more = 0, time.perf_counter(), True
        while more:
            run = world.run(_once(tree))
            reports = checker.check(run)
            schedule = tuple(world.run(lambda: Recorded(tree.replay())).strategy.choices) if reports else None
            end, more = tree.end(), tree.turn()
            if end != RETRY:
                seconds = time.perf_counter() - start
                yield Outcome(number, reports, run.switches, seconds, schedule, end, is_last=not more)
                number, start = number + 1, time.perf_counter()


def _once(tree: ChoiceTree) -> Callable[[], Strategy]:
    """Makes the next run's strategy, then others that make the same run."""
    strategies = iter([tree.begin()])
    return lambda: next(strategies, None) or tree.replay()


def rank_of(fiber: Fiber) -> str:
    """The family of a fiber: a rank's next call begins when all its blocks have left the last one."""
    return fiber.block.name.split()[1]
