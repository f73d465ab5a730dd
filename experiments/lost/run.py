"""One run as the parent sees it: forked ranks, signals at random moments, and the end of all of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flashmoe_numba.kernel import control as s

from . import memory as m
from .memory import Memory
from .rank import be_rank
from .world import Trial

NAP_S, SHORT_NAP_S = 1e-3, 1e-4
LONGEST_CALL_S = 0.02
SETUP_LIMIT_S = 60.0
PR_SET_PDEATHSIG = 1


class Hang(Exception):
    """A rank did not come to an end; says where everybody stands."""


class Run:
    """Ranks at work, from the common start on.

    `fell` are the places at which signals met their rank. After each of `faults_ns` a rank may take a deadline to end.
    """

    def __init__(self, world: Trial, rng: np.random.Generator) -> None:
        self.world, self.rng, self.memory = world, rng, Memory(world.config, world.save)
        self.num_ranks = world.config.num_ranks
        self.fell: list[str] = []
        self.began_ns = 0
        self.faults_ns: list[int] = []
        self.lost: set[int] = set()  # ranks of which nothing more is expected
        self.raised: set[int] = set()  # ranks that may end with an error of their own
        self.pids: list[int] = []
        self._ended: dict[int, int] = {}  # rank -> wait status

    def start(self) -> None:
        """Fork the ranks, wait until all are ready, and let them go."""
        for rank_idx in range(self.num_ranks):
            self.pids.append(_fork(lambda rank_idx=rank_idx: be_rank(self.world, self.memory, rank_idx)))  # type: ignore[misc]
        self._wait_for(lambda: bool((self.memory.words[:, m.PHASE] != m.SETTING_UP).all()), SETUP_LIMIT_S)
        self.began_ns = time.monotonic_ns()
        self.memory.go[0] = 1

    def wait_for_moment(self, rank_idx: int) -> None:
        """Somewhere in the calls of this rank, or between two, drawn from the generator."""
        calls = int(self.rng.integers(self.world.num_calls))
        self._wait_for(lambda: bool(self.memory.words[rank_idx, m.CALLS] >= calls), self._limit_s(), SHORT_NAP_S)
        call_ns = (time.monotonic_ns() - self.began_ns) / max(1, calls)
        time.sleep(self.rng.uniform(0, min(call_ns / 1e9, LONGEST_CALL_S)))

    def send(self, victim: int, signum: int) -> None:
        """Signal a rank, wait until it stands still if that is what the signal does, and note where it was."""
        if victim in self._ended:
            return
        if signum == signal.SIGKILL:
            self.lost.add(victim)
        self.faults_ns.append(time.monotonic_ns())  # before it: a rank that continues may end at once
        os.kill(self.pids[victim], signum)
        if signum in (signal.SIGKILL, signal.SIGSTOP):
            _, status = os.waitpid(self.pids[victim], os.WUNTRACED)
            if not os.WIFSTOPPED(status):
                self._ended[victim] = status
            self.fell.append(self.memory.place(victim))

    def wait_for_others(self, victim: int) -> None:
        """Until all ranks but this one have ended."""
        self._wait_for(lambda: self._have_ended(set(range(self.num_ranks)) - {victim}), self._limit_s())

    def wait_for_all(self) -> None:
        """Until all ranks that can end have."""
        self._wait_for(lambda: self._have_ended(set(range(self.num_ranks)) - self.lost), self._limit_s())

    def wait_for_giving_up(self) -> int | None:
        """The first rank seen to give up, as soon as it does; None if all have ended."""
        limit_ns = time.monotonic_ns() + int(1e9 * self._limit_s())
        controls = [self.memory.control(rank_idx) for rank_idx in range(self.num_ranks)]
        while time.monotonic_ns() < limit_ns:
            for rank_idx, control in enumerate(controls):
                if control[s.RECORD] != 0 and rank_idx not in self._ended:
                    return rank_idx
            if self._have_ended(set(range(self.num_ranks)) - self.lost):
                return None
        raise Hang(self.standing())

    def status(self, rank_idx: int) -> int:
        """Wait status of a rank that has ended."""
        return self._ended[rank_idx]

    def standing(self) -> str:
        """What every rank is at."""
        lines = []
        for rank_idx, words in enumerate(self.memory.words):
            control = self.memory.control(rank_idx)
            where = "ended" if rank_idx in self._ended else self.memory.place(rank_idx)
            tasks, abort, record = (int(control[word]) for word in (s.PROGRESS, s.ABORT, s.RECORD))
            told = f"call {words[m.CALLS]}, {tasks} tasks, abort word {abort}, record {record}"
            lines.append(f"rank {rank_idx}: {where}, {told}, outcome {words[m.OUTCOME]} {self.memory.text(rank_idx)}")
        return "\n".join(lines)

    def end(self) -> None:
        """Kill what is left."""
        for rank_idx, pid in enumerate(self.pids):
            if rank_idx not in self._ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self._ended[rank_idx] = os.waitpid(pid, 0)[1]

    def _limit_s(self) -> float:
        """Far above any time that a rank may take."""
        return 20 + 10 * self.world.deadline_s

    def _have_ended(self, ranks: set[int]) -> bool:
        for rank_idx in sorted(ranks - set(self._ended)):
            pid, status = os.waitpid(self.pids[rank_idx], os.WNOHANG)
            if pid != 0:
                self._ended[rank_idx] = status
        return ranks <= set(self._ended)

    def _wait_for(self, condition: Callable[[], bool], limit_s: float, nap_s: float = NAP_S) -> None:
        limit_ns = time.monotonic_ns() + int(1e9 * limit_s)
        while not condition():
            if time.monotonic_ns() > limit_ns:
                raise Hang(self.standing())
            time.sleep(nap_s)


@contextlib.contextmanager
def running(world: Trial, rng: np.random.Generator) -> Iterator[Run]:
    """A run whose ranks have just begun; none of them outlives the block."""
    run = Run(world, rng)
    try:
        run.start()
        yield run
    finally:
        run.end()


def _fork(child: Callable[[], Any]) -> int:
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # NumPy's threads; the child does not use them
        pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        child()
    return pid
