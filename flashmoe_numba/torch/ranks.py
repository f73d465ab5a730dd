"""Processes that compute one model together, their modules, and what they tell each other at each call of one.

A call of a module takes all ranks, and as many calls of its layer as the rank with the most tokens needs. So before it
every rank tells which module it calls, whether forward or backward, and how many calls it needs itself (rounds.py).
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import FlashMoEError
from ..layer.arguments import communicator
from ..processes.meeting import SETUP_DEADLINE_S
from .description import read
from .rounds import DONE, FORWARD, LAST_MODULE, MAKING, MOST_CALLS, RELEASING, Rounds, Step

Member = tuple[Callable[[], nn.Module | None], Sequence[str], str]
NOBODY: Member = (lambda: None, (), "")
ROUTER = "router"  # of a description's tensors


class Ranks(Rounds):
    """The ranks of a communicator or a process group, of which this process is one. All ranks make theirs together.

    Args:
        name: in descriptions, of this process only.
        comm, process_group: one of them, as `FlashMoE` takes it.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
        TimeoutError: not all ranks came.
    """

    def __init__(self, name: str, comm: Any, process_group: Any) -> None:
        super().__init__(comm, process_group)
        self.name, self.given = name, {"comm": comm, "process_group": process_group}
        self.num_topk: dict[int, int | None] = {}  # of modules by number, where a routing comes with each call
        self._numbers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._members: list[Member] = []
        self._marks: dict[int, int] = {}  # of routers, when the module was first called

    def is_of(self, comm: Any, process_group: Any) -> bool:
        return self.given["comm"] is comm and self.given["process_group"] is process_group

    def number_of(self, module: nn.Module, paths: Sequence[str], description: str) -> int:
        """The module's, the same on all ranks: they make, or first call, theirs in the same order.

        Args:
            paths, description: of the module, as `ownership.operands` takes them.
        """
        if module not in self._numbers:
            if len(self._members) > LAST_MODULE:
                most = LAST_MODULE + 1
                raise FlashMoEError(f"these ranks have had {most} modules, which is the most: make other ones")
            self._numbers[module] = len(self._members)
            self._members.append((weakref.ref(module), paths, description))
        return self._numbers[module]

    def mark(self, number: int, tensors: Sequence[torch.Tensor], description: str) -> None:
        """A module of this number is called, with these operands: at the first call all ranks have the same router."""
        if number not in self._marks:
            fields = [name.partition(":")[0] for name in read(description)[0]]
            routers = [tensor for field, tensor in zip(fields, tensors, strict=True) if field == ROUTER]
            self._marks[number] = mark_of(routers[0]) if routers else 0

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
            kind: FORWARD, KEPT_FORWARD or BACKWARD. Ranks that are done take part in the first alone.

        Raises:
            FlashMoEError: a rank is missing, or calls another module, or in another way. Nothing is computed with these
                ranks any more.
        """
        if num_calls > MOST_CALLS:
            raise FlashMoEError(f"at most {MOST_CALLS} calls for one of a module, got {num_calls}")
        with self.calling:
            told = self.tell(Step(kind, module, num_calls, self._marks.get(module, 0)))
            self.require(told, self.rank_idx, *([DONE] if kind == FORWARD else []))
            yield max(step.number for step in told)

    def next_of_others(self) -> tuple[int, int] | None:
        """This rank is done: (module's number, calls of its layer) that the others make next; None: all are done.

        Raises:
            FlashMoEError: as `call` does; or the others do something else than calls without gradients.
        """
        with self.calling:
            told = self.tell(Step(DONE))
            first = min(range(self.num_ranks), key=told.__getitem__)
            who = first if told[first].kind == FORWARD else self.rank_idx
            self.require(told, who, DONE)
        return None if who == self.rank_idx else (told[who].module, max(step.number for step in told))

    def meet_to_make(self) -> None:
        """Wait for all ranks before a layer is made: what keeps one from it is known to the others at once.

        Raises:
            FlashMoEError: a rank is missing, has left because of an error, or does something else.
        """
        with self.calling:
            communicator(**self.given)  # raises if the group was destroyed, and then this rank does not come
            self.require(self.tell(Step(MAKING), SETUP_DEADLINE_S), self.rank_idx)

    def all_can_release(self, unused: bool) -> bool:
        """Is a layer unused on all ranks?

        Raises:
            FlashMoEError: a rank is missing, or does something else.
        """
        with self.calling:
            told = self.tell(Step(RELEASING, number=int(unused)))
            self.require(told, self.rank_idx)
        return all(step.number for step in told)


def mark_of(router: torch.Tensor) -> int:
    """A number that another router hardly has; not 0."""
    return 1 + zlib.crc32(router.detach().cpu().contiguous().view(torch.uint8).numpy())
