"""A world: one run of the kernel through all its calls, by the hosts of all ranks.

Ranks are as independent as processes: each begins its next call as soon as its own blocks have left the last one, so
one may be a call ahead of another.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, TypeVar

import numpy as np
from greenlet import getcurrent

from ...device.fibers import QUIET_POLLS, Deadlock, Fiber, Scheduler, Strategy
from .arrays import Arrays
from .blame import Blame
from .calls import Call
from .hosts import Host, Table
from .memory import Region
from .network import Network
from .reports import Report, Stopped
from .spec import WorldSpec
from .waiting import waiting

S = TypeVar("S", bound=Strategy)
MAX_SWITCHES = 200_000  # a run of three ranks through three calls has some 10 000


@dataclass
class Run(Generic[S]):
    """One run: `calls[rank]` are the calls that ended, and `strategy` is the one that made it."""

    reports: list[Report]
    switches: int
    calls: list[list[Call]]
    strategy: S


class WatchedWorld(Arrays):
    """Arrays of all ranks, who judges calls that are given up, and where blocks of a grid find their arguments."""

    def __init__(self, spec: WorldSpec, kernel: ModuleType) -> None:
        super().__init__(spec, kernel)
        self.table = Table(self) if spec.grid else None
        self.blame = Blame(spec, [self.watched(rank.segments) for rank in self.ranks], self.images)
        self._first = [(region, _first_content(region)) for region in self.regions.values()]

    def run(self, make_strategy: Callable[[], S], late_seed: int | None = None, with_places: bool = False) -> Run[S]:
        """One run from the beginning; whatever goes wrong in it is a report.

        Args:
            make_strategy: one that has not run yet. If there is something to report, the same run is made once more, to
                note the places.
            late_seed: decides which loads of atomic words are late, and which puts overtake each other; None: words are
                sequentially consistent, and puts come in their order.
            with_places: note the places at once, whether there is something to report or not.
        """
        if not with_places:
            run = self._run(make_strategy(), late_seed, with_places=False)
            if not run.reports:
                return run
        return self._run(make_strategy(), late_seed, with_places=True)

    def _run(self, strategy: S, late_seed: int | None, with_places: bool) -> Run[S]:
        self.memory.begin(with_places, late_seed)
        for region, content in self._first:
            region.array[:] = content
        self.begin_run()
        quiet_polls = QUIET_POLLS + 2 * (self.spec.deadline or 0)  # a poll takes a switch: time enough to give up
        scheduler = Scheduler(max_switches=MAX_SWITCHES, strategy=strategy, quiet_polls=quiet_polls)
        groups = [self.ranks] if self.table else [[rank] for rank in self.ranks]
        network = Network(self, None if late_seed is None else random.Random(late_seed).random)
        hosts = [Host(self, self.table, self.blame, network, scheduler, ranks) for ranks in groups]
        of_ranks = {host.ranks[0].rank_idx: host for host in hosts}
        self.blame.begin(of_ranks)
        network.begin(scheduler, of_ranks)
        for host in hosts:
            host.begin()
        problem = self._try(scheduler, hosts, network)
        _abandon(hosts, network)
        reports = self.memory.reports + ([problem] if problem else [])
        return Run(reports, scheduler.switches, [calls for host in hosts for calls in host.calls], strategy)

    def _try(self, scheduler: Scheduler, hosts: list[Host], network: Network) -> Report | None:
        try:
            scheduler.run()
        except Stopped:
            return None
        except Deadlock as error:
            return Report("deadlock", _waits(str(error).split("\n")[0], hosts, network))
        except RuntimeError as error:
            return Report("livelock", _waits(str(error).split("\n")[0], hosts, network))
        except Exception as error:
            return Report("error", f"{type(error).__name__}: {error}")
        wrong = self.blame.compare() if self.spec.can_stop else None
        return Report("blame", wrong) if wrong else None


def _first_content(region: Region) -> Any:
    if region.initialised:
        return region.array.copy()
    return np.full(region.array.nbytes, 0xFF, np.uint8).view(region.dtype)


def _alive(hosts: list[Host], network: Network) -> list[Fiber]:
    of_hosts = [fiber for host in hosts for fiber in host.fibers + host.leaving]
    return [fiber for fiber in of_hosts + network.fibers if not fiber.dead]


def _abandon(hosts: list[Host], network: Network) -> None:
    """End the fibers of a run that did not come to its end: the garbage collector does not see into their stacks."""
    for fiber in _alive(hosts, network):
        fiber.parent = getcurrent()
        fiber.throw()


def _waits(why: str, hosts: list[Host], network: Network) -> str:
    lines = [waiting(fiber) for fiber in _alive(hosts, network)]
    return "\n    ".join([why, *lines])
