"""The calls of a layer: one at a time, of any kind, each begun and ended by all ranks of this process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from ..backends.protocols import Arguments
from ..errors import FlashMoEError
from ..heap.rank import Rank
from ..kernel.control import CLOSED_BY_THREAD
from .life import Life
from .parts import Parts

LAST_EPOCH = 2**31 - 1


class Call(Protocol):
    """What a call brings.

    Attributes:
        tokens: of each rank here, as its memory checked them.
    """

    @property
    def tokens(self) -> Sequence[Any]: ...

    def begin(self, position: int, rank: Rank, epoch: int, deadline_ns: int) -> tuple[Any, Arguments]:
        """(what the rank at this position here returns, what its blocks are given)."""


class Calls:
    """Takes the calls of all threads in turn."""

    def __init__(self, parts: Parts, life: Life) -> None:
        self._parts, self._life = parts, life
        self._lock = threading.Lock()
        self._caller = 0
        self._num_tokens: list[int] = []

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The layer is this thread's, and open.

        Raises:
            FlashMoEError: it is closed.
        """
        with self._lock:
            self._caller = threading.get_ident()
            self._life.require_open()
            yield

    def run(self, call: Call, deadline_s: float) -> list[Any]:
        """What each rank here returns, in this thread's turn.

        Args:
            deadline_s: the call fails when nothing has moved on any rank for this long, as `FlashMoE` has it.

        Raises:
            FlashMoEError: the call was given up; the layer is closed.
        """
        parts, life = self._parts, self._life
        parts.backend.begin(call.tokens)
        life.raise_if_known()
        if life.epoch == LAST_EPOCH:
            raise FlashMoEError(f"a layer makes at most {LAST_EPOCH} calls, because flags count them: make a new one")
        life.epoch += 1
        self._num_tokens = [len(x) for x in call.tokens]
        begun = self._carried(call, deadline_s)
        life.raise_if_known()
        return [result for result, _ in begun]

    def _carried(self, call: Call, deadline_s: float) -> list[tuple[Any, Arguments]]:
        """What each rank here returns, and what its blocks were given; all that it sent to other hosts was taken."""
        parts, life = self._parts, self._life
        assert parts.heap is not None, "it goes when the layer is closed"
        try:
            with parts.heap.carrying(deadline_s):
                return self._run(call, parts.backend.deadline_ns(deadline_s))
        except FlashMoEError as error:
            if not life.closed:  # the heap's own: others wait for what was not carried
                life.raise_if_given_up()  # which says more: maybe of the same loss
                life.interrupt(error)
            raise

    def _run(self, call: Call, deadline_ns: int) -> list[tuple[Any, Arguments]]:
        parts, life = self._parts, self._life
        try:
            begun = [call.begin(i, rank, life.epoch, deadline_ns) for i, rank in enumerate(parts.ranks)]
            parts.backend.run([of_rank for _, of_rank in begun], life.leave)
        except BaseException as error:
            life.interrupt(error)
            raise
        return begun

    def last(self) -> list[tuple[Rank, int, int]]:
        """(rank, epoch, number of tokens) of each rank here in its last call."""
        self._life.require_open()
        if not self._num_tokens:
            raise ValueError("there was no call yet: routing, stats, row_tiles and traces tell of the last one")
        return list(zip(self._parts.ranks, self._life.epochs(), self._num_tokens, strict=True))

    def close(self, *, orderly: bool) -> None:
        """Take no more: end one that another thread makes, then the layer (see `Life.end`)."""
        if not self._lock.acquire(blocking=False):
            if self._caller == threading.get_ident():
                raise FlashMoEError("close() was called inside a call of this layer, say by a signal handler")
            self._life.leave(CLOSED_BY_THREAD)  # a call in another thread: end it, then go on
            self._lock.acquire()
        try:
            self._life.end(orderly=orderly)
        finally:
            self._lock.release()
