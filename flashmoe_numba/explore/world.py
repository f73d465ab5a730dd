"""A world: the layer's own arrays for all ranks, watched, and one run of the kernel through all its calls.

Ranks are as independent as processes: each begins its next call as soon as its own blocks have left the last one, so
one may be a call ahead of another. The arrays are made once; every run begins with them as a new layer has them, and
with NaN bits where a new layer has whatever was there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from greenlet import getcurrent

from reference import Layout, MoEConfig, Routing, Task, Weights
from reference.plan import max_tasks

from ..backends.fibers import FiberBackend
from ..device.fibers import Deadlock, Fiber, Scheduler, Strategy, current
from ..device.storage import as_storage
from ..kernel.state import Experts, Problem
from ..kernel.trace import RECEIVE, RECORD_WORDS
from ..rank import Rank
from .blame import Blame
from .memory import Actor, Memory, Region, joined
from .reports import Report, Stopped
from .spec import WorldSpec
from .waiting import waiting

NO_DEADLINE = 1 << 62  # the scheduler finds deadlocks by itself
MAX_SWITCHES = 200_000  # a run of three ranks through three calls has some 10 000


@dataclass
class Call:
    """What one rank had at the end of one call."""

    y: np.ndarray
    routing: Routing
    results: np.ndarray  # elements [num_ranks, num_experts_per_rank, slots, hidden]: the rank's result region
    rows: np.ndarray  # [num_ranks, num_experts_per_rank]: of the packets that the rank received
    tasks: Counter[Task]


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
        self.weights = Weights.random(c, seed=spec.data_seed, bias=True)
        self.num_blocks = spec.num_processors + 1
        self.num_lanes = c.num_ranks * self.num_blocks * spec.lanes
        hosts = c.num_ranks + len(spec.leavers) if spec.leavers else 0  # those that look, then those that give up
        self.memory = Memory(self.num_lanes + hosts)
        self.regions: dict[int, Region] = {}  # by id of the array
        self._backend = _WatchedBackend()
        segments = [np.empty(Layout(c).num_bytes, np.uint8) for _ in range(c.num_ranks)]
        self.ranks = [self._make_rank(rank_idx, segments) for rank_idx in range(c.num_ranks)]
        self._make_tokens()
        self.blame = Blame(spec, [self.regions[id(rank.control)] for rank in self.ranks])
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
        scheduler = Scheduler(max_switches=MAX_SWITCHES, strategy=strategy)
        hosts = [_Host(self, scheduler, rank) for rank in self.ranks]
        for host in hosts:
            host.begin()
        problem = self._try(scheduler, hosts)
        _abandon(hosts)
        reports = self.memory.reports + ([problem] if problem else [])
        return Run(reports, scheduler.switches, [host.calls for host in hosts])

    def _try(self, scheduler: Scheduler, hosts: list[_Host]) -> Report | None:
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
        wrong = self.blame.compare() if self.spec.leavers else None
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


class _Host:
    """One rank's host, which makes one call after the other."""

    def __init__(self, world: World, scheduler: Scheduler, rank: Rank) -> None:
        self.world, self.scheduler, self.rank = world, scheduler, rank
        self.calls: list[Call] = []
        self.fibers: list[Fiber] = []  # of this call
        self.leaving: list[Fiber] = []  # the one in which it gives up
        self._clock = [0] * world.memory.num_actors
        self._running = 0

    def begin(self) -> None:
        """Start the next call, if there is one."""
        epoch = len(self.calls) + 1
        if epoch > len(self.world.data):
            return
        x, routings = self.world.data[epoch - 1]
        rank_idx, lanes = self.rank.rank_idx, self.world.spec.lanes
        self._y, blocks = self.rank.call(x[rank_idx], routings[rank_idx], epoch, NO_DEADLINE)
        self._running, self.fibers = len(blocks) * lanes, []
        for name, arguments in blocks:
            self.scheduler.add_block(name, self._lane, self.world.watched(arguments), lanes)
        if rank_idx in self.world.spec.leavers and epoch == len(self.world.data):
            arguments = self.world.watched(self.rank.leaving(epoch))
            self.scheduler.add_block(f"rank {rank_idx} host", self._leave, (epoch, *arguments))

    def _leave(self, epoch: int, *arguments: Any) -> None:
        self.leaving.append(current())
        spec = self.world.spec
        index = self.world.num_lanes + spec.config.num_ranks + spec.leavers.index(self.rank.rank_idx)
        self._act(index, epoch, current().name)
        self.world.kernel.leave(*arguments)

    def _lane(self, block: int, *arguments: Any) -> None:
        fiber, epoch = current(), len(self.calls) + 1
        index = (self.rank.rank_idx * self.world.num_blocks + block) * fiber.lanes + fiber.lane
        self._act(index, epoch, fiber.name)
        self.fibers.append(fiber)
        self.world.kernel.persistent(block, *arguments)
        self._running -= 1
        if self._running == 0:
            self._clock = joined([fiber.actor.clock for fiber in self.fibers])
            if not self._given_up(epoch):
                self._end()
                if not self._given_up(epoch):  # as the next call begins
                    self.begin()

    def _act(self, index: int, epoch: int, name: str) -> None:
        """The running fiber is this actor of the memory, who knows what the rank's last blocks did."""
        current().actor = Actor(self.world.memory, index, name, self.rank.rank_idx, epoch, self._clock)

    def _given_up(self, epoch: int) -> bool:
        """The host, in the fiber of the last lane to end, looks for its abort word; nobody sets one if none leaves."""
        if not self.world.spec.leavers:
            return False
        rank_idx = self.rank.rank_idx
        self._act(self.world.num_lanes + rank_idx, epoch, f"rank {rank_idx} host after its blocks")
        given_up = self.world.blame.look(rank_idx)
        self._clock = current().actor.clock
        return given_up

    def _end(self) -> None:
        c = self.rank.config
        shape = (c.num_ranks, c.num_experts_per_rank, c.slots, c.hidden)
        results = self.rank.segments.result.view(c.numpy_dtype).reshape(shape).copy()
        rows = self.rank.packets.rows.reshape(shape[:2]).copy()
        self.calls.append(Call(self._y.copy(), self.rank.routing(len(self._y)), results, rows, self._tasks()))

    def _tasks(self) -> Counter[Task]:
        tasks: Counter[Task] = Counter()
        for trace in self.rank.traces:
            for kind, peer, expert, m, n, *_ in trace.reshape(-1, RECORD_WORDS)[1 : trace[0] + 1].tolist():
                if kind != RECEIVE:
                    tasks[Task(kind, self.rank.rank_idx, peer, expert, m, n)] += 1
        return tasks


def _alive(hosts: list[_Host]) -> list[Fiber]:
    return [fiber for host in hosts for fiber in host.fibers + host.leaving if not fiber.dead]


def _abandon(hosts: list[_Host]) -> None:
    """End the fibers of a run that did not come to its end: the garbage collector does not see into their stacks."""
    for fiber in _alive(hosts):
        fiber.parent = getcurrent()
        fiber.throw()


def _waits(why: str, hosts: list[_Host]) -> str:
    lines = [waiting(fiber) for fiber in _alive(hosts)]
    return "\n    ".join([why, *lines])
