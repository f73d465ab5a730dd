"""A target in a process of its own: it may hang, crash or print without harm to the check."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import ExitStack, suppress
from typing import Any

from reference import Weights

from ...processes.pools import Pool, process_pool
from .target import Answer, Call, Target, TargetError, answers, load

WARM_UP = 10  # times the limit for what is done once


class TimeLimit(TargetError):
    """A call took longer than it may."""


class Subject:
    """Calls of one target, in a process that is begun again after one that was lost.

    Args:
        limit_s: for each group of calls, loading the target included if its process has just begun.
    """

    def __init__(self, target: Target, limit_s: float) -> None:
        self._target, self._limit_s = target, limit_s
        self._pool: Pool | None = None
        self._pid = 0
        self._stack = ExitStack()

    def __enter__(self) -> Subject:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def load(self) -> None:
        """See that the target can be loaded.

        Raises:
            TargetError: it cannot.
        """
        self._ask(WARM_UP * self._limit_s, load_quietly, self._target)

    def warm_up(self, weights: Weights, call: Call) -> None:
        """Make a first call, which may compile. Whether it is right or fails, the properties will say.

        Raises:
            TimeLimit: no answer. What was compiled till then is lost, so that every other call would end like it.
        """
        try:
            self._ask(WARM_UP * self._limit_s, answers, self._target, weights, [call])
        except TimeLimit:
            raise
        except TargetError:
            return

    def run(self, weights: Weights, calls: Sequence[Call]) -> list[Answer]:
        """Make a layer, and these calls of it.

        Raises:
            TargetError: a call failed, the process died, or `limit_s` has passed.
        """
        given: list[Answer] = self._ask(self._limit_s, answers, self._target, weights, calls)
        return given

    def _ask(self, limit_s: float, function: Any, *arguments: Any) -> Any:
        if self._pool is None:
            self._pool = self._stack.enter_context(process_pool(1))
            self._pid = self._pool.submit(_begin).result()
        future = self._pool.submit(function, *arguments)
        try:
            return future.result(limit_s)
        except TimeoutError:
            self._end()
            raise TimeLimit(f"no answer within {limit_s:g} s") from None
        except BrokenExecutor:
            self._end()
            raise TargetError("its process died, by a signal or an exit of its own") from None

    def _end(self) -> None:
        if self._pool is not None and self._pid:
            _kill(self._pid)
        self._stack.close()
        self._pool, self._pid = None, 0


def load_quietly(target: Target) -> None:
    """`load`, whose result belongs to its process."""
    load(target)


def _begin() -> int:
    """What a target prints goes to stderr: stdout is for results. Returns the process' number.

    Ctrl-C is for the parent, which ends this process: a target that it ended would look like one that crashed.
    """
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return os.getpid()


def _kill(pid: int) -> None:
    """A process that hangs hears nothing else; it may be gone already."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
