"""MPI messages between two ranks of different hosts: those that go there, and those that come from there.

What is posted is never waited for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from reference.arrays import Array

MOST_FLYING = 64  # messages to one rank that MPI has at a time
PATIENCE = 10  # a send that MPI refused is tried again when so many times have passed as it took


class Outbox:
    """What goes to one rank, in the order in which it was posted.

    MPI takes a message at once if the rank is connected. What it refuses, because the rank is gone or has not answered
    yet, is tried again later.

    Args:
        limit: while it is entered, MPI refuses (processes/send_limit.py).
    """

    def __init__(self, rank_idx: int, limit: AbstractContextManager[None]) -> None:
        self._rank_idx, self._limit = rank_idx, limit
        self._waiting: deque[tuple[Any, Array, int]] = deque()
        self._flying: deque[tuple[Any, Array]] = deque()  # with what must live as long
        self._again = 0.0

    def __bool__(self) -> bool:
        """Is there anything that has not left?"""
        return bool(self._waiting or self._flying)

    @property
    def is_stuck(self) -> bool:
        """Is there more than MPI takes at the moment?"""
        return bool(self._waiting)

    def post(self, comm: Any, data: Array, tag: int) -> None:
        """Send an array when it is its turn. It must stay as it is until then."""
        self._waiting.append((comm, data, tag))

    def push(self) -> bool:
        """Send what can be sent; returns whether anything has moved.

        MPI is asked for news between two sends: a send into a connection of which it has not noticed that it broke ends
        this process.
        """
        moved = self._drop_sent()
        while self._waiting and len(self._flying) < MOST_FLYING and time.monotonic() >= self._again:
            moved |= self._send_next()
            self._drop_sent()
        return moved

    def _drop_sent(self) -> bool:
        moved = False
        while self._flying and self._flying[0][0].Test():
            self._flying.popleft()
            moved = True
        return moved

    def _send_next(self) -> bool:
        comm, data, tag = self._waiting[0]
        start = time.monotonic()
        try:
            with self._limit:
                request = comm.Isend(data, self._rank_idx, tag)
        except RuntimeError:  # mpi4py's: not now, and maybe never: then the ranks' own deadline says so
            end = time.monotonic()
            self._again = end + PATIENCE * (end - start)
            return False
        self._waiting.popleft()
        self._flying.append((request, data))
        return True


class Inbox:
    """What comes from one rank: pieces of rows that are on their way, and signals that wait for all before them."""

    def __init__(self) -> None:
        self._landing: deque[tuple[Any, int, int]] = deque()

    def __bool__(self) -> bool:
        """Is anything on its way?"""
        return bool(self._landing)

    def expect(self, request: Any, flag: int, word: int) -> None:
        """A piece, or None, and the signal that follows it; below 0: none."""
        self._landing.append((request, flag, word))

    def land(self, land: Callable[[int, int], None]) -> bool:
        """Give what has arrived to `land`, up to the first that has not; returns whether anything has."""
        moved = False
        while self._landing and (self._landing[0][0] is None or self._landing[0][0].Test()):
            _, flag, word = self._landing.popleft()
            land(flag, word)
            moved = True
        return moved
