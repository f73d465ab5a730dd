"""Processes that compute one model together, and what they tell each other at each call of a module.

A call of a module takes all ranks, and as many calls of its layer as the rank with the most tokens needs. So before it
every rank tells which module it calls, whether forward or backward, and how many calls it needs itself, by a word in
shared memory. Whoever waits there gives up after a deadline; ranks that call different modules are told so.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from reference.arrays import Array

from ..errors import FlashMoEError
from ..heap.mpi import MpiHeap
from ..layer.arguments import DEADLINE_S, communicator
from ..processes.meeting import SETUP_DEADLINE_S
from ..processes.ownership import Owned

# Of a rank's words the first two are "round, what, number" of a round each, in turn: who comes to a round has read all
# words of the round before the last. The third says that the rank left.
LEFT = 2
NUM_WORDS = 3
ROUND_SHIFT, WHAT_SHIFT, MOST = 32, 16, (1 << 16) - 1
KIND_SHIFT, MOST_CALLS = 14, (1 << 14) - 1
FORWARD, KEPT_FORWARD, BACKWARD = range(3)  # kinds of a module's call
KINDS = ("", " for a backward", " backward")
DONE, RELEASING, ADDING = MOST, MOST - 1, MOST - 2  # in place of a module's number
LAST_ROUND = 2**31 - 1
ROOM = 1 << 18  # bytes of a rank that others may read in a round
SPINS, LONGEST_NAP_S = 20, 1e-3
MISSING = "every rank must call the same modules equally often (see flashmoe_numba.torch.join)"
Member = tuple[Callable[[], nn.Module | None], Sequence[str], str]
NOBODY: Member = (lambda: None, (), "")


class Ranks(Owned):
    """The ranks of a communicator or a process group, of which this process is one. All ranks make theirs together.

    Args:
        name: in descriptions, of this process only.
        comm, process_group: one of them, as `FlashMoE` takes it.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
        TimeoutError: not all ranks came.
    """

    def __init__(self, name: str, comm: Any, process_group: Any) -> None:
        self.name, self.given = name, {"comm": comm, "process_group": process_group}
        self.over: str | None = None
        self.num_topk: dict[int, int | None] = {}  # of modules by number, where a routing comes with each call
        self._heap = MpiHeap(communicator(comm, process_group), SETUP_DEADLINE_S)
        self._heap.allocate(8 * NUM_WORDS + 2 * ROOM)
        self._words = [segment[: 8 * NUM_WORDS].view(np.int64) for segment in self._heap.segments]
        self._rooms = [segment[8 * NUM_WORDS :].reshape(2, ROOM) for segment in self._heap.segments]
        self.num_ranks, self.rank_idx = self._heap.num_ranks, self._heap.rank_indices[0]
        self._round = 0
        self._numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._members: list[Member] = []
        self.calling = threading.RLock()  # taken before the session's

    def is_of(self, comm: Any, process_group: Any) -> bool:
        return self.given["comm"] is comm and self.given["process_group"] is process_group

    def number_of(self, module: nn.Module, paths: Sequence[str], description: str) -> int:
        """The module's, the same on all ranks: they make, or first call, theirs in the same order.

        Args:
            paths, description: of the module, as `ownership.operands` takes them.
        """
        if module not in self._numbers:
            if len(self._members) == ADDING:
                raise FlashMoEError(f"these ranks have had {ADDING} modules, which is the most: use other ones")
            self._numbers[module] = len(self._members)
            self._members.append((weakref.ref(module), paths, description))
        return self._numbers[module]

    def member(self, number: int) -> tuple[nn.Module, Sequence[str], str]:
        """(module, paths, description) of a number.

        Raises:
            FlashMoEError: this rank does not have the module, or not any more.
        """
        reference, paths, description = self._members[number] if number < len(self._members) else NOBODY
        module = reference()
        if module is None:
            rule = f"rank {self.rank_idx} has no module {number} of these ranks, which others call"
            raise FlashMoEError(f"{rule}: with register() call the model once on every rank before")
        return module, paths, description

    def member_of(self, module: nn.Module) -> tuple[Sequence[str], str] | None:
        """(paths, description) of a module; None: it is none of these ranks'."""
        if module not in self._numbers:
            return None
        _, paths, description = self._members[self._numbers[module]]
        return paths, description

    @contextmanager
    def call(self, module: int, num_calls: int, kind: int = FORWARD) -> Iterator[int]:
        """A call of a module by number, of which this rank's tokens need so many calls of a layer: those that it takes.

        Args:
            kind: of KINDS, by index.

        Raises:
            FlashMoEError: a rank is missing, or calls another module, or in another way. Nothing is computed with these
                ranks any more.
        """
        if num_calls > MOST_CALLS:
            raise FlashMoEError(f"at most {MOST_CALLS} calls for one of a module, got {num_calls}")
        with self.calling:
            told = self._tell(module, kind << KIND_SHIFT | num_calls)
            for rank, (what, number) in enumerate(told):
                if (what, number >> KIND_SHIFT) not in ((module, kind), *([(DONE, 0)] if kind == FORWARD else [])):
                    ours, theirs = _does(module, kind), _does(what, number >> KIND_SHIFT)
                    self._give_up(f"rank {self.rank_idx} {ours}, rank {rank} {theirs}: {MISSING}")
            yield max(number & MOST_CALLS for _, number in told)

    def next_of_others(self) -> tuple[int, int, int] | None:
        """This rank is done: (module's number, calls of its layer, their kind) that the others make next; None: all are
        done.

        Raises:
            FlashMoEError: as `call` does.
        """
        with self.calling:
            told = self._tell(DONE, 0)
        calls = [(what, number & MOST_CALLS, number >> KIND_SHIFT) for what, number in told if what != DONE]
        if len({(what, kind) for what, _, kind in calls}) > 1:
            does = ", ".join(sorted({_does(what, kind) for what, _, kind in calls}))
            self._give_up(f"ranks differ, one of them {does}: {MISSING}")
        return max(calls) if calls else None

    def all_can_release(self, unused: bool) -> bool:
        """Is a layer unused on all ranks?"""
        with self.calling:
            told = self._tell(RELEASING, int(unused))
        if any(what != RELEASING for what, _ in told):
            self._give_up(f"rank {self.rank_idx} releases layers, and another rank does not: {MISSING}")
        return all(number for _, number in told)

    def exchange(self, mine: Array | None, count: int, dtype: Any) -> list[Array | None]:
        """What each rank brings to this round, `[count]` numbers of a type in at most ROOM bytes, or None.

        They are theirs, and may change from the next round but one on.

        Raises:
            FlashMoEError: a rank is missing, or does something else.
        """
        with self.calling:
            half = (self._round + 1) % 2
            rooms = [room[half, : count * np.dtype(dtype).itemsize].view(dtype) for room in self._rooms]
            if mine is not None:
                rooms[self.rank_idx][:] = mine
            told = self._tell(ADDING, int(mine is not None))
        if any(what != ADDING for what, _ in told):
            self._give_up(f"rank {self.rank_idx} adds up gradients, and another rank does not: {MISSING}")
        return [room if there else None for room, (_, there) in zip(rooms, told, strict=True)]

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

    def _tell(self, what: int, number: int) -> list[tuple[int, int]]:
        """What every rank tells in this round, once all have come to it."""
        self._raise_if_over()
        if self._round == LAST_ROUND:
            raise FlashMoEError(
                f"at most {LAST_ROUND} calls of modules of these ranks, which are made: make other ranks"
            )
        self._round += 1
        slot = self._round % LEFT
        self._words[self.rank_idx][slot] = self._round << ROUND_SHIFT | what << WHAT_SHIFT | number
        since, looks, nap = time.monotonic(), 0, 1e-5
        while late := [rank for rank in range(self.num_ranks) if self._word(rank, slot) >> ROUND_SHIFT != self._round]:
            self._raise_if_missed(late, time.monotonic() - since)
            looks += 1
            if looks > SPINS:
                time.sleep(nap)
                nap = min(2 * nap, LONGEST_NAP_S)
        words = [self._word(rank, slot) for rank in range(self.num_ranks)]
        return [(word >> WHAT_SHIFT & MOST, word & MOST) for word in words]

    def _word(self, rank: int, word: int) -> int:
        return int(self._words[rank][word])

    def _raise_if_missed(self, late: list[int], waited_s: float) -> None:
        me = f"rank {self.rank_idx} gave up before call {self._round} of a module of these ranks: "
        for rank in late:
            if self._word(rank, LEFT):
                self._give_up(f"{me}rank {rank} left because of an error of its own")
        if waited_s > DEADLINE_S:
            ranks = f"rank {', '.join(map(str, late))} did not come within {DEADLINE_S:g} s"
            self._give_up(f"{me}{ranks}: {MISSING}, or it was late, or is gone")


def _does(what: int, kind: int) -> str:
    """What a rank does that has told this."""
    others = {RELEASING: "releases layers", DONE: "has left join()", ADDING: "adds up gradients"}
    return others.get(what, f"calls module {what} of these ranks{KINDS[kind]}")
