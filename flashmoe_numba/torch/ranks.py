"""Processes that compute one model together, and what they tell each other at each call of a module.

A call of a module takes all ranks, and as many calls of its layer as the rank with the most tokens needs. So before it
every rank tells which module it calls and how many calls it needs itself, by a word in shared memory. Whoever waits
there gives up after a deadline; ranks that call different modules are told so.
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
DONE, RELEASING, MAKING = MOST, MOST - 1, MOST - 2  # in place of a module's number
DOES = {DONE: "has no more calls", RELEASING: "releases layers", MAKING: "makes a layer"}
LAST_ROUND = 2**31 - 1
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
        self._heap.allocate(8 * NUM_WORDS)
        self._words = [segment.view(np.int64) for segment in self._heap.segments]
        self.num_ranks, self.rank_idx = self._heap.num_ranks, self._heap.rank_indices[0]
        self._round = self._num_calls = 0
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
            if len(self._members) == MAKING:
                raise FlashMoEError(f"these ranks have had {MAKING} modules, which is the most: use other ones")
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

    @contextmanager
    def call(self, module: int, num_calls: int) -> Iterator[int]:
        """A call of a module by number, of which this rank's tokens need so many calls of a layer: those that it takes.

        Raises:
            FlashMoEError: a rank is missing, or calls another module. Nothing is computed with these ranks any more.
        """
        with self.calling:
            told = self._tell(module, num_calls)
            self._require(told, self.rank_idx, module, DONE)
            yield max(number for _, number in told)

    def next_of_others(self) -> tuple[int, int] | None:
        """This rank is done: (module's number, calls of its layer) that the others make next; None: all are done.

        Raises:
            FlashMoEError: as `call` does.
        """
        with self.calling:
            told = self._tell(DONE, 0)
        module, who = min((what, rank) for rank, (what, _) in enumerate(told))
        if module in DOES:  # nobody calls one
            module, who = DONE, self.rank_idx
        self._require(told, who, module, DONE)
        return None if module == DONE else (module, max(number for _, number in told))

    def meet_to_make(self) -> None:
        """Wait for all ranks before a layer is made: what keeps one from it is known to the others at once.

        Raises:
            FlashMoEError: a rank is missing, has left because of an error, or does something else.
        """
        with self.calling:
            self._require(self._tell(MAKING, 0, SETUP_DEADLINE_S), self.rank_idx, MAKING)

    def all_can_release(self, unused: bool) -> bool:
        """Is a layer unused on all ranks?"""
        with self.calling:
            told = self._tell(RELEASING, int(unused))
            self._require(told, self.rank_idx, RELEASING)
        return all(number for _, number in told)

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

    def _require(self, told: list[tuple[int, int]], who: int, *whats: int) -> None:
        """Give up if a rank told anything but these; the message sets it against rank `who`."""
        does = [
            f"rank {rank} {DOES.get(what, f'calls module {what} of these ranks')}"
            for rank, (what, _) in enumerate(told)
        ]
        for rank, (what, _) in enumerate(told):
            if what not in whats:
                self._give_up(f"{does[who]}, {does[rank]}: {MISSING}")

    def _tell(self, what: int, number: int, patience_s: float | None = None) -> list[tuple[int, int]]:
        """What every rank tells in this round, once all have come to it; None: within the deadline of a call."""
        self._raise_if_over()
        if number > MOST or self._round == LAST_ROUND:
            raise FlashMoEError(f"at most {MOST} calls for one of a module, and {LAST_ROUND} of modules, got {number}")
        self._round += 1
        self._num_calls += what not in (RELEASING, MAKING)
        slot = self._round % LEFT
        self._words[self.rank_idx][slot] = self._round << ROUND_SHIFT | what << WHAT_SHIFT | number
        since, looks, nap = time.monotonic(), 0, 1e-5
        while late := [rank for rank in range(self.num_ranks) if self._word(rank, slot) >> ROUND_SHIFT != self._round]:
            self._raise_if_missed(late, time.monotonic() - since, DEADLINE_S if patience_s is None else patience_s)
            looks += 1
            if looks > SPINS:
                time.sleep(nap)
                nap = min(2 * nap, LONGEST_NAP_S)
        words = [self._word(rank, slot) for rank in range(self.num_ranks)]
        return [(word >> WHAT_SHIFT & MOST, word & MOST) for word in words]

    def _word(self, rank: int, word: int) -> int:
        return int(self._words[rank][word])

    def _raise_if_missed(self, late: list[int], waited_s: float, patience_s: float) -> None:
        me = f"rank {self.rank_idx} gave up before call {self._num_calls} of a module of these ranks: "
        for rank in late:
            if self._word(rank, LEFT):
                self._give_up(f"{me}rank {rank} left because of an error of its own")
        if waited_s > patience_s:
            ranks = f"rank {', '.join(map(str, late))} did not come within {patience_s:g} s"
            self._give_up(f"{me}{ranks}: {MISSING}, or it was late, or is gone")
