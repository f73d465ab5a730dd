"""Hosts of a world: each makes one call after the other, and looks after each whether it was given up.

A host has one rank, as a process has; where a grid runs all ranks' blocks in one launch, one host has them all, and its
next call begins when all blocks have left the last one, as launches in a stream do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...backends.protocols import Arguments
from ...device.fibers import Fiber, Scheduler, clock, current, note_progress
from ...device.records import record_words
from ...heap.kept import Kept
from ...heap.rank import Rank
from ...heap.sums import Sums
from ...kernel.grid import HEADER_WORDS, RankArguments
from .arrays import NO_DEADLINE, Arrays
from .blame import Blame
from .calls import Call, call_of
from .memory import Actor, joined
from .network import Network


class Table:
    """The words in which blocks of a grid find their arguments (kernel/grid.py), watched; the kernel counts epochs.

    A rank has as many as the longest record takes, whose first words are those of the shorter one.
    """

    def __init__(self, world: Arrays) -> None:
        self._world = world
        self._width = len(self._words(world.longest))
        words = [self._words(rank.first_arguments()) for rank in world.ranks]
        rows = [[1, *row[1:], *[0] * (self._width - len(row))] for row in words]
        self.array = np.array([world.num_blocks, self._width, *(word for row in rows for word in row)], np.int64)
        self.region = world.memory.region("table", self.array)
        world.regions[id(self.array)] = self.region
        for rank in world.ranks:
            world.regions[id(rank.left)] = world.memory.region(f"rank {rank.rank_idx} left", rank.left)

    def arguments(self, of_rank: Arguments, block: int, of_persistent: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of `grid_block`, for a block that would have these of `persistent`, or of both for backwards; the host writes
        the rank's part.
        """
        words, rank_idx = self._words(of_rank), of_rank.problem.rank_idx
        at = HEADER_WORDS + rank_idx * self._width
        self.array[at + 1 : at + len(words)] = words[1:]
        scratch, box = self._world.watched(of_persistent[-3:-1])
        return rank_idx * self._world.num_blocks + block, self.region, of_rank, scratch, box

    @staticmethod
    def _words(of_rank: Arguments) -> list[int]:
        return record_words(of_rank, lambda array: array.ctypes.data)


class Host:
    """Makes the calls of these ranks. `calls[i]` are those that ended of the i-th one."""

    def __init__(
        self,
        world: Arrays,
        table: Table | None,
        blame: Blame,
        network: Network,
        scheduler: Scheduler,
        ranks: Sequence[Rank],
    ) -> None:
        self.world, self.scheduler, self.ranks = world, scheduler, ranks
        self._table, self._blame, self._network = table, blame, network
        self.calls: list[list[Call]] = [[] for _ in ranks]
        self.fibers: list[Fiber] = []  # of this call
        self._results: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []  # of the call: y, and gradients by name
        self._kept: list[dict[int, Kept]] = [{} for _ in ranks]  # of each one's calls
        self.leaving: list[Fiber] = []  # the one in which it gives up
        self.is_lost = self.is_told = False  # it is told that a call was given up
        self._clock = [0] * world.memory.num_actors
        self._running = self._tasks = 0  # of this call: lanes, and tasks that have ended

    @property
    def epoch(self) -> int:
        """The call that has not ended yet."""
        return len(self.calls[0]) + 1

    @property
    def is_over(self) -> bool:
        """Nothing of it runs any more."""
        return all(fiber.dead for fiber in self.fibers + self.leaving)

    def begin(self) -> None:
        """Start the next call, if there is one."""
        if self.epoch > len(self.world.data):
            return
        self.fibers, self._results, self._tasks = [], [], 0
        if not self._lose():
            for rank, kept in zip(self.ranks, self._kept, strict=True):
                self._launch(rank, self.epoch, kept)
            self._running = len(self.fibers)

    def _launch(self, rank: Rank, epoch: int, kept: dict[int, Kept]) -> None:
        world, lanes, rank_idx = self.world, self.world.spec.lanes, rank.rank_idx
        found, of_rank = world.begin_call(rank, epoch, world.spec.deadline or NO_DEADLINE, kept)
        self._results.append(self._named(rank_idx, found) if world.spec.forward_of(rank_idx, epoch) else (found, {}))
        for block, (name, entry_name, arguments) in enumerate(world.backend.blocks(of_rank)):
            entry, given = self._entry(of_rank, block, entry_name, arguments)
            self.fibers += self.scheduler.add_block(name, self._lane, (rank_idx, block, entry, given), lanes)
        if rank_idx in world.spec.leavers and epoch == len(world.data):
            arguments = world.watched(rank.leaving(epoch))
            self.leaving = self.scheduler.add_block(f"rank {rank_idx} host", self._leave, (rank_idx, epoch, *arguments))

    def _named(self, rank_idx: int, found: tuple[Any, ...]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(gradients of the tokens, all others by name), of what a backward returns."""
        dx, topk_weights, logits = found
        others = {"topk_weights": topk_weights} | ({} if logits is None else {"logits": logits})
        return dx, others | self.world.gradients[rank_idx]._asdict()

    def _entry(
        self, of_rank: Arguments, block: int, name: str, arguments: tuple[Any, ...]
    ) -> tuple[Callable[..., None], tuple[Any, ...]]:
        """What a block of a call enters, and what it is given."""
        if self._table:
            kernel = self.world.kernel
            enter = kernel.grid_block if isinstance(of_rank, RankArguments) else kernel.grid_block_backward
            return enter, self._table.arguments(of_rank, block, arguments)
        return getattr(self.world.kernel, name), self.world.watched(arguments)

    def _leave(self, rank_idx: int, epoch: int, *arguments: Any) -> None:
        spec = self.world.spec
        index = self.world.num_lanes + spec.config.num_ranks + spec.leavers.index(rank_idx)
        self._act(index, rank_idx, epoch, current().name)
        self.world.kernel.leave(*arguments)

    def _lane(self, rank_idx: int, block: int, entry: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        fiber = current()
        index = (rank_idx * self.world.num_blocks + block) * fiber.lanes + fiber.lane
        self._act(index, rank_idx, self.epoch, fiber.name)
        waits = fiber.lane == 0 or block == self.world.spec.num_processors  # other lanes of a processor never do
        if waits and self.world.spec.deadline is not None:
            fiber.actor.time = clock()
        entry(*arguments)
        if fiber.actor.time is not None:
            fiber.actor.take_time(clock())
        self._running -= 1
        if self._running == 0:
            self._clock = joined(
                [fiber.actor.clock for fiber in self.fibers] + self._network.wait_until_taken(rank_idx)
            )
            if not self._given_up():
                self._end()
                if not self._given_up():  # as the next call begins
                    self.begin()

    def _act(self, index: int, rank_idx: int, epoch: int, name: str) -> None:
        """The running fiber is this actor of the memory, who knows what the host's last blocks did."""
        current().actor = Actor(self.world.memory, index, name, rank_idx, epoch, self._clock)

    def _given_up(self) -> bool:
        """The host, in the fiber of the last lane to end, looks for its abort word, if anybody can set one."""
        if not self.world.spec.can_stop:
            return False
        rank_idx = self.ranks[0].rank_idx
        self._act(self.world.num_lanes + rank_idx, rank_idx, self.epoch, f"rank {rank_idx} host after its blocks")
        self.is_told = self._blame.look(rank_idx)
        self._clock = current().actor.clock
        return self.is_told

    # ---- a rank that is lost

    def finished_task(self) -> None:
        """One of the rank's processors has; it does not return where the rank is lost with it."""
        self._tasks += 1
        if self._lose():
            note_progress()
            self.scheduler.lose(self.fibers)

    def _lose(self) -> bool:
        """Is this the moment in which the rank is lost?"""
        now = self.ranks[0].rank_idx, self.epoch, self._tasks
        self.is_lost = self.is_lost or now in self.world.spec.lost
        return self.is_lost

    # ---- what a call leaves

    def _end(self) -> None:
        epoch = self.epoch  # it counts calls that ended
        for rank, (y, gradients), calls in zip(self.ranks, self._results, self.calls, strict=True):
            if self.world.spec.begins_sums(rank.rank_idx, epoch) and not self.world.spec.frozen_experts:
                Sums().settle(self.world.gradients[rank.rank_idx], True, rank.idle_experts())
            calls.append(call_of(rank, y, epoch, gradients))
