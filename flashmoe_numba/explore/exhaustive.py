"""Every interleaving of a small world, up to the order of independent accesses: runs until the tree has no more."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ..device.fibers import Fiber
from .checks import Checker
from .choice_tree import RETRY, ChoiceTree
from .search import Outcome, Search, watched_kernel
from .world import World


def check_search(search: Search) -> None:
    """Raises ValueError where the tree would not hold everything."""
    spec = search.spec
    if spec.lanes > 1:
        raise ValueError(f"lanes must be 1 for an exhaustive search, got {spec.lanes}")
    if spec.leaver is not None:
        raise ValueError(f"leaver must be None for an exhaustive search, got {spec.leaver}")
    if search.weak:
        raise ValueError("weak must be False for an exhaustive search, got True")


def explore_all(search: Search) -> Iterator[Outcome]:
    """An outcome for every class of interleavings, and for the runs it took besides; their seeds count them.

    Raises:
        ValueError: see `check_search`.
    """
    check_search(search)
    with watched_kernel(search.plant) as kernel:
        world = World(search.spec, kernel, search.keep_history)
        checker, tree = Checker(world), ChoiceTree(world.memory, _rank)
        number, start, more = 0, time.perf_counter(), True
        while more:
            strategies = iter([tree.begin()])
            run = world.run(lambda: next(strategies, None) or tree.replay())  # noqa: B023
            reports = checker.check(run)
            end = tree.end()
            if end != RETRY:
                yield Outcome(number, reports, run.switches, time.perf_counter() - start, run.history, end)
                number, start = number + 1, time.perf_counter()
            more = tree.turn()


def _rank(fiber: Fiber) -> str:
    """A rank's next call begins when all its blocks have left the last one."""
    return fiber.block.name.split()[1]
