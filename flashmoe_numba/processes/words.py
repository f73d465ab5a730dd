"""Words that every rank has, one line of a few each, and that all others read: what is behind a meeting of processes.

Ranks of one machine share them. Ranks of several send their line to all others whenever it changes; nobody waits for
such a message, and one that a dead rank does not take holds nobody up.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np

from reference.arrays import Array

LINE_WORDS = 8  # on a cache line of its own
MINE_AGAIN_S = 0.05  # words that change all the time are sent so often


class Words(Protocol):
    """Lines of all ranks.

    Attributes:
        all: `[num_ranks, LINE_WORDS]`.
        mine: this rank's line, to be changed by it alone.
        one_clock: `time.monotonic_ns` is the same on all ranks.
    """

    all: Array
    mine: Array
    one_clock: bool

    def tell(self) -> None:
        """This rank's line has changed: let the others know."""

    def tell_in_time(self) -> None:
        """The same, where it changes all the time and only that it does is of interest."""

    def look(self) -> None:
        """Take what others have told."""


def make_words(comm: Any, one_machine: bool) -> Words:
    """Lines of zeros, of the ranks of an mpi4py communicator."""
    return SharedWords(comm) if one_machine else SentWords(comm)


class SharedWords:
    """Of ranks that share memory: a change is seen at once."""

    one_clock = True

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        num_bytes = 8 * LINE_WORDS * comm.size if comm.rank == 0 else 0
        self._window = MPI.Win.Allocate_shared(num_bytes, 1, comm=comm)
        memory: Any = self._window.Shared_query(0)[0]
        self.all = np.frombuffer(memory, np.int64).reshape(comm.size, LINE_WORDS)
        self.mine = self.all[comm.rank]
        self.mine[:] = 0

    def tell(self) -> None:
        """They have seen it."""

    def tell_in_time(self) -> None:
        """They have seen it."""

    def look(self) -> None:
        """It is all there."""


class SentWords:
    """Of ranks on several machines: each has a copy of all lines."""

    one_clock = False

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Dup()
        self.all = np.zeros((comm.size, LINE_WORDS), np.int64)
        self.mine = self.all[comm.rank]
        self._on_their_way: list[Any] = []
        self._told = 0.0

    def tell(self) -> None:
        line = self.mine.copy()
        others = (rank for rank in range(self._comm.size) if rank != self._comm.rank)
        self._on_their_way = [request for request in self._on_their_way if not request.Test()]
        self._on_their_way += [self._comm.Isend(line, rank) for rank in others]
        self._told = time.monotonic()

    def tell_in_time(self) -> None:
        if time.monotonic() - self._told > MINE_AGAIN_S:
            self.tell()

    def look(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        while (message := self._comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status)) is not None:
            message.Recv(self.all[status.source])
