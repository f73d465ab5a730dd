"""Rounds that all ranks come to: in each every rank tells the others what it does, by a word in shared memory.

Whoever waits there gives up after a deadline; ranks that do different things are told so.
"""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

import numpy as np

from reference.arrays import Array

from ..errors import FlashMoEError
from ..heap.mpi import MpiHeap
from ..layer.arguments import DEADLINE_S, communicator
from ..processes.meeting import SETUP_DEADLINE_S
from ..processes.ownership import Owned

FORWARD, KEPT_FORWARD, BACKWARD, DONE, RELEASING, MAKING, ADDING = range(7)
DOES = {
    FORWARD: "calls module {} of these ranks",
    KEPT_FORWARD: "calls module {} of these ranks for a backward",
    BACKWARD: "calls module {} of these ranks backward",
    DONE: "has left join()",
    RELEASING: "releases layers",
    MAKING: "makes a layer",
    ADDING: "adds up gradients",
}
# Of a rank's words the first two are "round, kind, module, number" of a round each, in turn: who comes to a round has
# read all words of the round before the last. The third says that the rank left; the last are of a round each again:
# a mark (see `Step`).
LEFT, MARKS = 2, 3
NUM_WORDS = 5
ROUND_SHIFT, KIND_SHIFT, MODULE_SHIFT = 33, 30, 14
LAST_ROUND, LAST_KIND, LAST_MODULE, MOST_CALLS = (1 << 31) - 1, (1 << 3) - 1, (1 << 16) - 1, (1 << 14) - 1
ROOM = 1 << 18  # bytes of a rank that others may read in a round
SPINS, LONGEST_NAP_S = 20, 1e-3
MISSING = (
    "every rank must call the same modules equally often (see flashmoe_numba.torch.join, for calls without gradients)"
)
OTHER_ROUTER = (
    "one of this number with another router: every rank must make the same modules, with the same routers, in the same "
    "order"
)
OTHER_PARAMETER = "those of another parameter: every rank must have the same ones, in the same order"


class Step(NamedTuple):
    """What a rank does in a round: a kind of DOES, and of calls the module's number and how many of a layer it needs.

    Of other kinds the module is 0, and the number what the kind says.

    Args:
        mark: of the module's router, or of the parameter whose gradients are added up, by which ranks know that they
            mean the same; 0: there is none.
    """

    kind: int
    module: int = 0
    number: int = 0
    mark: int = 0

    @property
    def does(self) -> str:
        """In words."""
        return DOES[self.kind].format(self.module)


class Rounds(Owned):
    """Those of the ranks of a communicator or a process group, of which this process is one.

    Args:
        comm, process_group: one of them, as `FlashMoE` takes it.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
        TimeoutError: not all ranks came.
    """

    def __init__(self, comm: Any, process_group: Any) -> None:
        self.over: str | None = None
        self._heap = MpiHeap(communicator(comm, process_group), SETUP_DEADLINE_S)
        self._heap.allocate(8 * NUM_WORDS + 2 * ROOM)
        self._words = [segment[: 8 * NUM_WORDS].view(np.uint64) for segment in self._heap.segments]
        self._rooms = [segment[8 * NUM_WORDS :].reshape(2, ROOM) for segment in self._heap.segments]
        self.num_ranks, self.rank_idx = self._heap.num_ranks, self._heap.rank_indices[0]
        self._round = self._num_calls = 0
        self.calling = threading.RLock()  # taken before the session's

    def tell(self, step: Step, patience_s: float | None = None) -> list[Step]:
        """What every rank does in this round, once all have come to it; None: within the deadline of a call.

        Raises:
            FlashMoEError: a rank is missing, or has left because of an error. Nothing is computed with these ranks any
                more.
        """
        self._raise_if_over()
        if self._round == LAST_ROUND:
            raise FlashMoEError(f"these ranks have met {LAST_ROUND} times, which is the most: make other ones")
        self._round += 1
        self._num_calls += step.kind <= DONE
        slot = self._round % LEFT
        self._words[self.rank_idx][MARKS + slot] = step.mark
        self._words[self.rank_idx][slot] = _word_of(self._round, step)
        patience_s = DEADLINE_S if patience_s is None else patience_s
        since, looks, nap = time.monotonic(), 0, 1e-5
        while late := [rank for rank in range(self.num_ranks) if self._word(rank, slot) >> ROUND_SHIFT != self._round]:
            self._raise_if_missed(step, late, time.monotonic() - since, patience_s)
            looks += 1
            if looks > SPINS:
                time.sleep(nap)
                nap = min(2 * nap, LONGEST_NAP_S)
        marks = [self._word(rank, MARKS + slot) for rank in range(self.num_ranks)]
        return [_step_of(self._word(rank, slot))._replace(mark=mark) for rank, mark in enumerate(marks)]

    def require(self, told: list[Step], who: int, *kinds: int) -> None:
        """Give up if a rank does something else than rank `who`, and none of these kinds.

        Raises:
            FlashMoEError: saying what both do.
        """
        for rank, step in enumerate(told):
            if step[:2] != told[who][:2] and step.kind not in kinds:
                self._give_up(f"rank {who} {told[who].does}, rank {rank} {step.does}: {MISSING}")
            if step[:2] == told[who][:2] and step.mark != told[who].mark:
                other = OTHER_PARAMETER if step.kind == ADDING else OTHER_ROUTER
                self._give_up(f"rank {who} {told[who].does}, and rank {rank} {other}")

    def exchange(self, mine: Array | None, count: int, dtype: Any, mark: int = 0) -> list[Array | None]:
        """What each rank brings to this round, `[count]` numbers of a type in at most ROOM bytes, or None.

        They are theirs, and may change from the next round but one on.

        Args:
            mark: of the parameter whose gradients these are, the same on all ranks.

        Raises:
            FlashMoEError: a rank is missing, or does something else.
        """
        with self.calling:
            half = (self._round + 1) % 2
            rooms = [room[half, : count * np.dtype(dtype).itemsize].view(dtype) for room in self._rooms]
            if mine is not None:
                rooms[self.rank_idx][:] = mine
            told = self.tell(Step(ADDING, 0, int(mine is not None), mark))
            self.require(told, self.rank_idx)
        return [room if step.number else None for room, step in zip(rooms, told, strict=True)]

    def end(self, error: BaseException | str) -> None:
        """Nothing more is computed with these ranks, and the others shall know."""
        self.over = self.over or str(error) or type(error).__name__
        self._words[self.rank_idx][LEFT] = 1

    def _raise_if_over(self) -> None:
        self.require_maker()
        if self.over is not None:
            raise FlashMoEError(f"nothing is computed with these ranks any more, because a call failed: {self.over}")

    def _give_up(self, why: str) -> None:
        self.end(why)
        raise FlashMoEError(why)

    def _word(self, rank: int, word: int) -> int:
        return int(self._words[rank][word])

    def _raise_if_missed(self, step: Step, late: list[int], waited_s: float, patience_s: float) -> None:
        me = f"rank {self.rank_idx} gave up at call {self._num_calls}: it {step.does}, "
        for rank in late:
            if self._word(rank, LEFT):
                self._give_up(f"{me}rank {rank} left because of an error of its own")
        if waited_s > patience_s:
            ranks = f"rank {', '.join(map(str, late))} did not come within {patience_s:g} s"
            self._give_up(f"{me}{ranks}: {MISSING}, or it was late, or is gone")


def _word_of(number: int, step: Step) -> int:
    return number << ROUND_SHIFT | step.kind << KIND_SHIFT | step.module << MODULE_SHIFT | step.number


def _step_of(word: int) -> Step:
    return Step(word >> KIND_SHIFT & LAST_KIND, word >> MODULE_SHIFT & LAST_MODULE, word & MOST_CALLS)
