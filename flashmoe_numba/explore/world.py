"""A world: the layer's own arrays for all ranks, watched, and one run of the kernel through all its calls.

Ranks are as independent as processes: each begins its next call as soon as its own blocks have left the last one, so
one may be a call ahead of another. The arrays are made once; every run begins with them as a new layer has them, and
with NaN bits where a new layer has whatever was there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from greenlet import getcurrent

from reference import Layout, MoEConfig
from reference.plan import max_tasks

from ..backends.fibers import FiberBackend
from ..device.fibers import QUIET_POLLS, Deadlock, Fiber, Scheduler, Strategy
from ..device.storage import as_storage
from ..kernel.state import Experts, Problem
from ..rank import Rank
from .blame import Blame, patience
from .hosts import Call, Host, Table
from .memory import Memory, Region
from .reports import Report, Stopped
from .spec import WorldSpec
from .waiting import waiting

MAX_SWITCHES = 200_000  # a run of three ranks through three calls has some 10 000


@dataclass
class Run:
    """One run: `calls[rank]` are the calls that ended."""

    reports: list[Report]
    switches: int
    calls: list[list[Call]]


class World:
    """Arrays of all ranks, made once for many runs.

    Args:
        kernel: an interpreted kernel package whose verbs are `watched`.
    """

    def __init__(self, spec: WorldSpec, kernel: ModuleType) -> None:
        c = spec.config
        self.spec, self.kernel, self.data = spec, kernel, spec.calls()
        self.weights = spec.weights()
        self.num_blocks = spec.num_processors + 1
        self.num_lanes = c.num_ranks * self.num_blocks * spec.lanes
        self.can_stop = bool(spec.leavers) or spec.deadline is not None  # if not, hosts have nothing to look for
        hosts = c.num_ranks + len(spec.leavers) if self.can_stop else 0  # those that look, then those that give up
        self.memory = Memory(self.num_lanes + hosts, *patience(spec))
        self.regions: dict[int, Region] = {}  # by id of the array
        self._backend = _WatchedBackend()
        segments = [np.empty(Layout(c).num_bytes, np.uint8) for _ in range(c.num_ranks)]
        self.ranks = [self._make_rank(rank_idx, segments) for rank_idx in range(c.num_ranks)]
        self._make_tokens()
        self.table = Table(self) if spec.grid else None
        self.blame = Blame(spec, [self.watched(rank.segments) for rank in self.ranks])
        self._first = [(region, _first_content(region)) for region in self.regions.values()]

    def run(
        self, make_strategy: Callable[[], Strategy], late_seed: int | None = None, with_places: bool = False
    ) -> Run:
        """One run from the beginning; whatever goes wrong in it is a report.

        Args:
            make_strategy: one that has not run yet. If there is something to report, the same run is made once more, to
                note the places.
            late_seed: decides which loads of atomic words are late; None: words are sequentially consistent.
            with_places: note the places at once, whether there is something to report or not.
        """
        if not with_places:
            run = self._run(make_strategy(), late_seed, with_places=False)
            if not run.reports:
                return run
        return self._run(make_strategy(), late_seed, with_places=True)

    def _run(self, strategy: Strategy, late_seed: int | None, with_places: bool) -> Run:
        self.memory.begin(with_places, late_seed)
        for region, content in self._first:
            region.array[:] = content
        quiet_polls = QUIET_POLLS + 2 * (self.spec.deadline or 0)  # a poll takes a switch: time enough to give up
        scheduler = Scheduler(max_switches=MAX_SWITCHES, strategy=strategy, quiet_polls=quiet_polls)
        groups = [self.ranks] if self.table else [[rank] for rank in self.ranks]
        hosts = [Host(self, scheduler, ranks) for ranks in groups]
        self.blame.begin({host.ranks[0].rank_idx: host for host in hosts})
        for host in hosts:
            host.begin()
        problem = self._try(scheduler, hosts)
        _abandon(hosts)
        reports = self.memory.reports + ([problem] if problem else [])
        return Run(reports, scheduler.switches, [calls for host in hosts for calls in host.calls])

    def _try(self, scheduler: Scheduler, hosts: list[Host]) -> Report | None:
        try:
            scheduler.run()
        except Stopped:
            return None
        except Deadlock as error:
            return Report("deadlock", _waits(str(error).split("\n")[0], hosts))
        except RuntimeError as error:
            return Report("livelock", _waits(str(error).split("\n")[0], hosts))
        except Exception as error:
            return Report("error", f"{type(error).__name__}: {error}")
        wrong = self.blame.compare() if self.can_stop else None
        return Report("blame", wrong) if wrong else None

    # ---- arrays

    def _make_rank(self, rank_idx: int, segments: list[np.ndarray]) -> Rank:
        c, spec = self.spec.config, self.spec
        weights = self.weights.shard(rank_idx, c.num_ranks)
        records = max_tasks(c) + c.num_experts
        rank = Rank(c, rank_idx, weights, segments, spec.num_processors, self._backend, records)
        for group in (rank.segments, rank.tokens, rank.packets, rank.queue):
            for name, array in zip(group._fields, group, strict=True):
                self._watch(rank_idx, f"{type(group).__name__.lower()}.{name}", array)
        for block in range(self.num_blocks):
            self._watch(rank_idx, f"box of block {block}", rank.boxes[block])
            self._watch(rank_idx, f"trace of block {block}", rank.traces[block])
        for block, scratch in enumerate(rank.scratch):
            self._watch(rank_idx, f"scratch.rows of block {block}", scratch.rows)
            self._watch(rank_idx, f"scratch.sums of block {block}", scratch.sums)
        return rank

    def _watch(self, rank_idx: int, name: str, array: np.ndarray) -> None:
        group, _, what = name.partition(".")
        rows = name in ("segments.dispatch", "segments.result")
        initialised = not rows and not any(array is other for other in self._backend.uninitialised)
        writers = self.spec.config.num_ranks if rows or (group == "segments" and what.endswith("_flag")) else 0
        full_name = f"rank {rank_idx} {name}"
        self.regions[id(array)] = self.memory.region(full_name, array, initialised=initialised, num_writers=writers)

    def _make_tokens(self) -> None:
        for epoch, (x, _) in enumerate(self.data, start=1):
            for rank_idx, part in enumerate(x):
                adopted = as_storage(part), as_storage(np.empty_like(part))
                self._backend.adopted[id(part)] = (*adopted, adopted[1].view(part.dtype).reshape(part.shape))
                self._backend.uninitialised.append(adopted[1])
                self._watch(rank_idx, f"tokens.x of call {epoch}", adopted[0])
                self._watch(rank_idx, f"tokens.y of call {epoch}", adopted[1])

    def watched(self, value: Any) -> Any:
        """Kernel arguments with regions for arrays; sizes, and weights, which nobody writes, stay as they are."""
        if isinstance(value, np.ndarray):
            return self.regions[id(value)]
        if isinstance(value, tuple) and not isinstance(value, Experts | Problem):
            parts = [self.watched(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value


class _WatchedBackend(FiberBackend):
    """Remembers which arrays begin with whatever was there, and has room for the results of every call ready."""

    def __init__(self) -> None:
        super().__init__()
        self.uninitialised: list[np.ndarray] = []
        self.adopted: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def empty(self, size: int, dtype: Any) -> np.ndarray:
        self.uninitialised.append(super().empty(size, dtype))
        return self.uninitialised[-1]

    def make_scratch(self, config: MoEConfig) -> Any:
        scratch = super().make_scratch(config)
        self.uninitialised += scratch
        return scratch

    def adopt(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.adopted[id(x)]


def _first_content(region: Region) -> Any:
    if region.initialised:
        return region.array.copy()
    return np.full(region.array.nbytes, 0xFF, np.uint8).view(region.dtype)


def _alive(hosts: list[Host]) -> list[Fiber]:
    return [fiber for host in hosts for fiber in host.fibers + host.leaving if not fiber.dead]


def _abandon(hosts: list[Host]) -> None:
    """End the fibers of a run that did not come to its end: the garbage collector does not see into their stacks."""
    for fiber in _alive(hosts):
        fiber.parent = getcurrent()
        fiber.throw()


def _waits(why: str, hosts: list[Host]) -> str:
    lines = [waiting(fiber) for fiber in _alive(hosts)]
    return "\n    ".join([why, *lines])
