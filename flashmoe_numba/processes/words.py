"""Words that every rank has, one line of a few each, and that all others read: what is behind a meeting of processes.

Ranks of one machine share them. Ranks of several send their line to all others whenever it changes, and receive those
of others, in a thread of its own: a send to a rank that is just dying may never return, and hold up every call of MPI
in this process (seen over ofi/tcp). So nobody who waits for words calls MPI, and old words are all that can happen.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from typing import Any, Protocol

import numpy as np

from reference.arrays import Array

LINE_WORDS = 8  # on a cache line of its own
MINE_AGAIN_S = 0.05  # a line that has changed without a word is sent so often
GOODBYE_S = 2.0  # for messages that are under way when Python ends
LINE, GOODBYE = range(2)  # tags
HURRY_S = 2e-4  # between looks at what has come, while somebody waits for it
AWAITED_S = 2e-3  # so long after a nap somebody may still wait: several naps, and little of what they time then


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
        """This rank's line has changed: let the others know at once, and not only in time."""

    def nap(self, seconds: float) -> None:
        """Wait for new words of others, at most so long."""


def make_words(comm: Any, one_machine: bool) -> Words:
    """Lines of zeros, of the ranks of an mpi4py communicator."""
    return SharedWords(comm) if one_machine else SentWords(comm).begin()


class SharedWords:
    """Of ranks that share memory: a change is seen at once."""

    one_clock = True

    def __init__(self, comm: Any) -> None:
        from mpi4py import MPI

        num_bytes = 8 * LINE_WORDS * comm.size if comm.rank == 0 else 0
        window = MPI.Win.Allocate_shared(num_bytes, 1, comm=comm)
        atexit.register(window.Free)  # or MPI does not end over ofi/tcp: it finds its fabric in use
        memory: Any = window.Shared_query(0)[0]
        self.all = np.frombuffer(memory, np.int64).reshape(comm.size, LINE_WORDS)
        self.mine = self.all[comm.rank]
        self.mine[:] = 0

    def tell(self) -> None:
        """They have seen it."""

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)


class SentWords:
    """Of ranks on several machines: each has a copy of all lines."""

    one_clock = False

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Dup()
        self.all: Array = np.zeros((comm.size, LINE_WORDS), np.int64)
        self.mine: Array = self.all[comm.rank]
        self._sent, self._sent_at = self.mine.copy(), 0.0
        self._on_their_way: list[Any] = []
        self._staying = set(range(comm.size)) - {comm.rank}
        self._told, self._news, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._stir = threading.Event()  # of the thread that carries: there is something to do
        self._awaited_at = 0.0

    def begin(self) -> SentWords:
        """Exchange lines from now on, until Python ends, which is before MPI does."""
        carrier = threading.Thread(target=self._carry, name="flashmoe words", daemon=True)
        carrier.start()
        atexit.register(self._end, carrier)
        return self

    def _end(self, carrier: threading.Thread) -> None:
        """MPI does not end well while messages are under way."""
        self._ended.set()
        self._stir.set()
        carrier.join(GOODBYE_S + 1)

    def tell(self) -> None:
        self._told.set()
        self._stir.set()

    def nap(self, seconds: float) -> None:
        was_awaited, self._awaited_at = self._is_awaited, time.monotonic()
        if not was_awaited:
            self._stir.set()
        self._news.wait(seconds)
        self._news.clear()

    @property
    def _is_awaited(self) -> bool:
        """Does somebody wait for news, as far as naps tell?"""
        return time.monotonic() - self._awaited_at < AWAITED_S

    def _carry(self) -> None:
        from mpi4py import MPI

        while not self._ended.is_set():
            with contextlib.suppress(MPI.Exception):  # a rank is lost: the others may still speak
                self.exchange()
            self._stir.wait(HURRY_S if self._is_awaited else MINE_AGAIN_S)
            self._stir.clear()
        with contextlib.suppress(MPI.Exception):
            self.part(GOODBYE_S)

    def part(self, patience_s: float) -> None:
        """Send the last, and take the last of all others, if they come in time."""
        until = time.monotonic() + patience_s
        self._send(GOODBYE)
        while self._under_way() and time.monotonic() < until:
            self._receive()
            time.sleep(HURRY_S)

    def _under_way(self) -> bool:
        """Is there still something to come, or to go?"""
        self._on_their_way = [request for request in self._on_their_way if not request.Test()]
        return bool(self._on_their_way or self._staying)

    def exchange(self) -> None:
        """Send this line, if the others should know it, and take theirs."""
        late = time.monotonic() - self._sent_at > MINE_AGAIN_S and bool((self.mine != self._sent).any())
        if self._told.is_set() or late:
            self._told.clear()
            self._send(LINE)
        self._receive()

    def _send(self, tag: int) -> None:
        self._sent, self._sent_at = self.mine.copy(), time.monotonic()
        self._on_their_way = [request for request in self._on_their_way if not request.Test()]
        for rank in range(self._comm.size):
            if rank != self._comm.rank:
                self._on_their_way.append(self._comm.Isend(self._sent, rank, tag))

    def _receive(self) -> None:
        from mpi4py import MPI

        status = MPI.Status()
        while (message := self._comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status)) is not None:
            message.Recv(self.all[status.source])
            self._news.set()
            if status.tag == GOODBYE:
                self._staying.discard(status.source)
