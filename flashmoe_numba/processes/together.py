"""What the processes of a benchmark do together: meet, collect results, and leave.

Everything that waits here looks at the words of all ranks (words.py) and gives up after a deadline without progress, as
the kernel does; MPI's own collectives wait without a limit. A rank that leaves because of an error says so in its word,
and the others stop at once.
"""

from __future__ import annotations

import math
import os
import pickle
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from ..errors import FlashMoEError
from .ending import LAST_WORDS_S, end_all_ranks
from .launch import TERMINAL_VARIABLE, answer_ctrl_c, tell_begun
from .machine import machine_name
from .meeting import SETUP_DEADLINE_S, unlink_startup_segment, wait_for
from .mpi_environment import begin_mpi
from .shared_memory import Shortage
from .words import make_words

MEETINGS, STARTS, START_NS, PROGRESS, LEFT = range(5)  # words of a rank
GAVE_UP, FAILED = 1, 2  # values of LEFT: another rank is to blame, or this one
SPINS = 20
NAP_S = 5e-4
HEADSTART_NS = 2_000_000  # from the last arrival at a meeting to the common start: several naps


class LocalRanks:
    """One process, whatever ranks it holds: nobody to wait for."""

    rank_idx, num_ranks, comm = 0, 1, None
    num_ranks_here, machines = 1, (0,)

    def meet(self, what: str) -> None:
        """Nothing to wait for."""

    def note_progress(self) -> None:
        """Nobody is waiting."""

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def agree(self, code: int) -> int:
        return code


class MpiRanks:
    """The ranks of MPI's COMM_WORLD, on one machine or on several.

    Attributes:
        num_ranks_here: those that share this rank's machine.
        machines: the lowest rank of each machine.

    Args:
        deadline_s: a wait fails when no rank has made progress for this long. The first meeting may take longer.
    """

    def __init__(self, deadline_s: float) -> None:
        self.comm = begin_mpi().COMM_WORLD
        self.rank_idx, self.num_ranks = self.comm.rank, self.comm.size
        self._deadline_s = SETUP_DEADLINE_S
        names = self.comm.allgather(machine_name())
        self.num_ranks_here = names.count(machine_name())
        self.machines = tuple(sorted({names.index(name) for name in names}))
        self._line = make_words(self.comm, one_machine=len(self.machines) == 1)
        self._words, self._mine = self._line.all, self._line.mine
        self._finish(self.comm.Ibarrier, "at the start")
        if self.rank_idx in self.machines:
            unlink_startup_segment()
        tell_begun()
        answer_ctrl_c()
        self._call_deadline_s = deadline_s

    def meet(self, what: str) -> None:
        """Wait until all ranks are here, then return on all of them at the same moment, about 2 ms later.

        On several machines, whose clocks differ, each returns when it hears that all are here.

        Args:
            what: for the message, for instance "before call 3".

        Raises:
            FlashMoEError: a rank did not come, or left; says who waited for whom.
        """
        number = int(self._mine[MEETINGS]) + 1
        self._mine[MEETINGS] = number
        self._line.tell()
        self._wait(lambda: bool((self._words[:, MEETINGS] >= number).all()), what)
        first = self._words[0]
        if self.rank_idx == 0:
            first[START_NS] = time.monotonic_ns() + HEADSTART_NS
            first[STARTS] = number
            self._line.tell()
        self._wait(lambda: bool(first[STARTS] >= number), what)
        self._deadline_s = self._call_deadline_s
        if self._line.one_clock:
            time.sleep(max(0, int(first[START_NS]) - time.monotonic_ns()) * 1e-9)

    def note_progress(self) -> None:
        """Tell those who wait that this rank is at work."""
        self._mine[PROGRESS] += 1

    def gather(self, value: Any) -> list[Any] | None:
        """Everybody's `value` on rank 0, None on the others."""
        self.meet("before the results are collected")
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.empty(self.num_ranks, np.int64)
        collected = "while the results are collected"
        self._finish(lambda: self.comm.Iallgather(np.array([data.size]), sizes), collected)
        everything = np.empty(sizes.sum() if self.rank_idx == 0 else 0, np.uint8)
        target = (everything, sizes) if self.rank_idx == 0 else None
        self._finish(lambda: self.comm.Igatherv(data, target), collected)
        if self.rank_idx != 0:
            return None
        ends = np.cumsum(sizes)
        return [pickle.loads(everything[end - size : end].data) for size, end in zip(sizes, ends, strict=True)]

    def agree(self, code: int) -> int:
        """Rank 0's `code`, on all ranks; waits for it without a limit, because rank 0 may have much to compute."""
        word = np.array([code])
        self._finish(lambda: self.comm.Ibcast(word), "while rank 0 looks at the results", math.inf)
        return int(word[0])

    def abandon(self, error: BaseException) -> NoReturn:
        """Say why this rank goes, let the others say what they waited for, and end all of them."""
        self._mine[LEFT] = GAVE_UP if isinstance(error, FlashMoEError) else FAILED
        self._line.tell()
        if isinstance(error, KeyboardInterrupt):
            self._end("interrupted" if self.rank_idx == 0 else "", 130)
        if isinstance(error, FlashMoEError):
            self._end(f"error: {error}", 1)
        if isinstance(error, Shortage):  # all ranks have it
            self._end(f"error: {error}" if self.rank_idx == 0 else "", 1)
        trace = "".join(traceback.format_exception(error)).rstrip()
        self._end(f"rank {self.rank_idx} failed:\n{trace}", 1)

    def _end(self, message: str, code: int) -> NoReturn:
        if message:
            over = "\r\x1b[K" if os.environ.get(TERMINAL_VARIABLE) else ""  # the progress bar
            os.write(2, f"{over}flashmoe: {message}\n".encode())  # at once, so that ranks do not cut each other's lines
        time.sleep(LAST_WORDS_S)
        end_all_ranks(self.comm, code)

    def _finish(self, begin: Callable[[], Any], what: str, deadline_s: float | None = None) -> None:
        """Wait for a collective that `begin` begins: in a thread, as a lost rank may hold up a call of MPI for ever."""
        failed: list[Exception] = []

        def work() -> None:
            try:
                wait_for(begin(), math.inf)
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=work, name="flashmoe collective", daemon=True)
        thread.start()
        self._wait(lambda: not thread.is_alive(), what, deadline_s)
        if failed:
            raise failed[0]

    def _wait(self, done: Callable[[], bool], what: str, deadline_s: float | None = None) -> None:
        attempt, since, seen = 0, time.monotonic(), -1
        limit_s = self._deadline_s if deadline_s is None else deadline_s
        while not done():
            self._raise_if_left(what)
            progress = int(self._words[:, : PROGRESS + 1].sum())
            if progress != seen:
                since, seen = time.monotonic(), progress
            elif time.monotonic() - since > limit_s:
                silence = f"no rank made progress for {limit_s:g} s"
                raise FlashMoEError(f"rank {self.rank_idx} gave up {what}, {self._missing()}: {silence}")
            attempt += 1
            self._line.nap(NAP_S if attempt > SPINS else 0)

    def _raise_if_left(self, what: str) -> None:
        for rank, left in enumerate(self._words[:, LEFT].tolist()):
            if left:
                because = "left because of an error of its own" if left == FAILED else "gave up"
                raise FlashMoEError(f"rank {self.rank_idx} stopped {what}, {self._missing()}: rank {rank} {because}")

    def _missing(self) -> str:
        """Whom this rank waits for."""
        number = self._mine[MEETINGS]
        late = np.flatnonzero(self._words[:, MEETINGS] < number).tolist()
        if not late and self._words[0, STARTS] < number:
            late = [0]
        ranks = f"rank {', '.join(map(str, late))}" if late else "the other ranks"
        return f"while it waited for {ranks} to come to meeting {number}"
