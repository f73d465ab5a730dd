"""Many runs of one world: seeds in batches, and an explorer in each process that has some of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType

from ..device.compilation import PACKAGE, load_interpreted
from ..device.fibers import Strategy
from .choose.choice_tree import COMPLETE
from .choose.schedules import Choice, Scheduled
from .choose.strategies import RoundRobinStrategy, make_strategy
from .plants import PLANTS, planted
from .run.checks import Checker
from .run.reports import Report
from .run.spec import WorldSpec
from .run.watched import watch
from .run.world import WatchedWorld

SEEDS_PER_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Search:
    """What is explored: the same seed of the same search gives the same run.

    Args:
        strategy: one of strategies.STRATEGIES.
        depth: of bugs that PCT looks for.
        plant: name of a planted bug, or None for the kernel as it is.
        weak: loads of atomic words may be late (run/words.py); False: they are sequentially consistent.
    """

    spec: WorldSpec
    strategy: str = "random"
    depth: int = 3
    plant: str | None = None
    weak: bool = True


@dataclass(frozen=True)
class Outcome:
    """One seed's run; of an exhaustive search, the seed is the run's number.

    Args:
        schedule: of a bad run that no seed gives.
        end: one of choice_tree.py.
        is_last: there are no more runs to make.
    """

    seed: int
    reports: list[Report]
    switches: int
    seconds: float
    schedule: tuple[Choice, ...] | None = None
    end: str = COMPLETE
    is_last: bool = False


class Explorer:
    """Runs seeds of a search in this process."""

    def __init__(self, search: Search, kernel: ModuleType) -> None:
        self.search = search
        self.world = WatchedWorld(search.spec, kernel)
        self.checker = Checker(self.world)
        self.num_steps = self._measure_steps() if search.strategy == "pct" else 0

    def _measure_steps(self) -> int:
        """PCT's k: the steps of a run in turns, which is the same one for every seed."""
        return self.world.run(lambda: RoundRobinStrategy(0)).strategy.steps

    def strategy(self, seed: int) -> Callable[[], Strategy]:
        """Makes the strategy of a seed's run, as often as it is made."""
        name, depth = self.search.strategy, self.search.depth
        return lambda: make_strategy(name, seed, num_steps=self.num_steps, depth=depth)

    def again(self, bad: Outcome) -> Callable[[], Strategy]:
        """Makes a strategy of the same run."""
        schedule = bad.schedule
        return self.strategy(bad.seed) if schedule is None else lambda: Scheduled(schedule)

    def late_seed(self, seed: int) -> int | None:
        """Of the loads that are late in a seed's run; None: none is."""
        return seed if self.search.weak else None

    def run(self, seed: int) -> Outcome:
        """A seed's run, judged."""
        start = time.perf_counter()
        run = self.world.run(self.strategy(seed), self.late_seed(seed))
        reports = self.checker.check(run)
        return Outcome(seed, reports, run.switches, time.perf_counter() - start)


@contextlib.contextmanager
def watched_kernel(plant: str | None) -> Iterator[ModuleType]:
    """The kernel for `WatchedWorld`, with a planted bug if one is named."""
    with contextlib.ExitStack() as stack:
        if plant is None:
            yield watch(load_interpreted(PACKAGE / "kernel", "flashmoe_numba.kernel_watched"))
        else:
            yield watch(stack.enter_context(planted(PLANTS[plant])))


def explore(
    searches: Search | Sequence[Search], seeds: Sequence[int], pool: Executor | None = None
) -> Iterator[Outcome]:
    """The outcome of every seed, in order; in this process without a pool.

    Args:
        searches: of the same plant; see `search_of`.
    """
    searches = [searches] if isinstance(searches, Search) else searches
    if pool is None:
        with watched_kernel(searches[0].plant) as kernel:
            explorer = cache(lambda search: Explorer(search, kernel))
            for seed in seeds:
                yield explorer(search_of(searches, seed)).run(seed)
        return
    batches = [seeds[i : i + SEEDS_PER_BATCH] for i in range(0, len(seeds), SEEDS_PER_BATCH)]
    for future in [pool.submit(_run_batch, searches, batch) for batch in batches]:
        yield from future.result()


def search_of(searches: Sequence[Search], seed: int) -> Search:
    """Seeds take searches in turn."""
    return searches[seed % len(searches)]


def _run_batch(searches: Sequence[Search], seeds: Sequence[int]) -> list[Outcome]:
    outcomes = []
    for seed in seeds:
        search = search_of(searches, seed)
        try:
            outcomes.append(_explorer(search).run(seed))
        except Exception as error:
            error.add_note(f"while exploring seed {seed} of {search}")
            raise
    return outcomes


@lru_cache(maxsize=32)  # making one costs as much as many runs
def _explorer(search: Search) -> Explorer:
    """This process's explorer of a search."""
    return Explorer(search, _kernel(search.plant))


@lru_cache(maxsize=1)
def _kernel(plant: str | None) -> ModuleType:
    """A planted kernel is loaded whole, so that its folder goes before anything can end us."""
    with watched_kernel(plant) as kernel:
        return kernel
