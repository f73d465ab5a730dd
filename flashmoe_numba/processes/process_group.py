"""A process group of torch.distributed in the place of an mpi4py communicator: what `Meeting` asks of one.

Ranks meet in the group's store, where torch.distributed's own ranks meet before they have a backend. So every backend
will do, no message can meet the caller's, and a wait for a rank that is gone ends at the waiter's own deadline.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch.distributed as dist

from reference.arrays import Array

GONE = "the store of process_group does not answer: the process that holds it is gone, or torch.distributed has ended"
_duplicates: Counter[str] = Counter()  # by group; all its ranks make theirs in the same order


class GroupCommunicator:
    """The ranks of a process group, as far as a layer needs them.

    Args:
        process_group: of any backend but "mpi", which has no store; this process must be one of its ranks.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """

    argument = "process_group"

    def __init__(self, process_group: Any) -> None:
        if not dist.is_available() or not dist.is_initialized():
            rule = "torch.distributed must be initialised before process_group is given (init_process_group)"
            raise ValueError(f"{rule}, got {type(process_group).__name__}")
        if process_group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group must have this process among its ranks, got NON_GROUP_MEMBER of new_group")
        if not isinstance(process_group, dist.ProcessGroup):
            rule = "process_group must be a group of torch.distributed or None"
            raise TypeError(f"{rule}, got {type(process_group).__name__}")
        self.rank, self.size = process_group.rank(), process_group.size()
        self._name = process_group.group_name
        try:
            self._store = process_group.get_group_store().clone()  # with a connection of its own
        except RuntimeError as error:
            raise ValueError(f"process_group must have a store, as all backends but mpi do: {error}") from None

    def Idup(self) -> tuple[Duplicate, Gathering]:
        """A communicator of the same ranks, and a request that is done when all have one."""
        _duplicates[self._name] += 1
        made = Duplicate(self._store, f"flashmoe/{_duplicates[self._name]}", self.rank, self.size)
        return made, made.Ibarrier()


class Duplicate:
    """Ranks whose keys in the store are no other communicator's."""

    argument = GroupCommunicator.argument

    def __init__(self, store: Any, prefix: str, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store, self._prefix, self._count = store, prefix, 0

    def Iallgather(self, mine: Array, everybody: Array) -> Gathering:
        """Everybody's array in the rows of `everybody`, once the request is done."""
        self._count += 1
        return Gathering(self._store, f"{self._prefix}/{self._count}", self.rank, mine, everybody)

    def Ibarrier(self) -> Gathering:
        return self.Iallgather(np.zeros(0, np.uint8), np.zeros((self.size, 0), np.uint8))

    def Free(self) -> None:
        """Nothing is left in the store."""


class Gathering:
    """A request: `Test` looks at the store and does not wait.

    Rank 0 is done last, and removes the keys: nobody will read them any more, and where it is rank 0's process that
    holds the store, nobody needs it when that process goes on, maybe to its end.
    """

    def __init__(self, store: Any, name: str, rank: int, mine: Array, everybody: Array) -> None:
        self._store, self._rank, self._everybody = store, rank, everybody
        self._values = [f"{name}/{other}" for other in range(len(everybody))]
        self._notes = [f"{key}/read" for key in self._values[1:]]
        self._read = False
        self._ask("set", self._values[rank], mine.tobytes())

    def Test(self) -> bool:
        """Is it done?

        Raises:
            ConnectionError: the store is gone.
        """
        if not self._read:
            self._read = self._ask("check", self._values)
            if not self._read:
                return False
            for row, key in zip(self._everybody, self._values, strict=True):
                row[:] = np.frombuffer(self._ask("get", key), row.dtype)
            if self._rank > 0:
                self._ask("set", self._notes[self._rank - 1], b"")
        if self._rank > 0:
            return True
        if not self._ask("check", self._notes):
            return False
        for key in (*self._values, *self._notes):
            self._ask("delete_key", key)
        return True

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, what)(*arguments)
        except RuntimeError as error:
            raise ConnectionError(f"{GONE} ({str(error).splitlines()[0]})") from None
