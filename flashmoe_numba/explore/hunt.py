"""How many runs it takes to find a planted bug."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from .plants import PLANTS
from .search import Explorer, Search, watched_kernel
from .worlds import WORLDS


def searches(plant: str | None, worlds: Iterable[str], strategies: Sequence[str]) -> list[Search]:
    """WatchedWorld by world, each under every strategy."""
    return [Search(spec=WORLDS[world], strategy=each, plant=plant) for world in worlds for each in strategies]


def find(plant: str, runs: Iterable[tuple[Search, int]]) -> tuple[int, set[str]]:
    """(runs until a report of a kind that fits the plant, kinds reported till then); -1 runs if none did.

    Args:
        runs: (search, seed) of each, the searches of this plant.
    """
    seen: set[str] = set()
    with watched_kernel(plant) as kernel:
        explorer = cache(lambda search: Explorer(search, kernel))
        for run, (search, seed) in enumerate(runs, start=1):
            seen |= {report.kind for report in explorer(search).run(seed).reports}
            if seen & set(PLANTS[plant].found_by):
                return run, seen
    return -1, seen
