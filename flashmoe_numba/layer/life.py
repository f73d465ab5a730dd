"""How a layer fails and how it ends: what of it is known here, and what the ranks of other processes hear."""

from __future__ import annotations

import contextlib

import numpy as np

from ..errors import FlashMoEError
from ..heap.protocols import Heap
from ..kernel.control import ABORT, CLOSED_EARLY, FAILED
from ..kernel.signals import EPOCH_SHIFT
from .failures import explain
from .parts import Parts


class Life:
    """Of one layer, until it is closed or a call fails; not locked (see `Calls`).

    Attributes:
        epoch: calls that were begun.
        closed: why no more are taken; None while they are.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.epoch = 0
        self.closed: str | None = None

    def require_open(self) -> None:
        """Raise a FlashMoEError if no more calls are taken."""
        if self.closed:
            raise FlashMoEError(f"this layer is closed: {self.closed}")

    def epochs(self) -> list[int]:
        """The last call of each rank here."""
        return [self._parts.backend.epoch(position, self.epoch) for position in range(len(self._parts.ranks))]

    def controls(self) -> list[np.ndarray]:
        """Control words of all ranks."""
        heap, backend = self._parts.heap, self._parts.backend
        assert heap is not None, "ranks go with it"
        control = self._parts.layout.control
        return [backend.to_host(segment[control:]).view(np.int64) for segment in heap.segments]

    def raise_if_given_up(self) -> None:
        """Raise a FlashMoEError if a call was given up, once that is known to the host; the layer is closed then."""
        for rank in self._parts.ranks:
            if self._parts.backend.to_host(rank.control)[ABORT] != 0:  # then the record that it points to is complete
                self.closed = explain(rank.rank_idx, self.controls())
                raise FlashMoEError(self.closed)

    def raise_if_known(self) -> None:
        """A GPU may be at the call still: then a later one, or `synchronize`, tells what became of it."""
        if self._parts.backend.may_have_failed():
            self.raise_if_given_up()

    def interrupt(self, error: BaseException) -> None:
        """A call will not end, because of an error of this process."""
        self.closed = f"its last call was interrupted by {type(error).__name__}"
        self.leave()

    def leave(self, why: int = FAILED) -> None:
        """Tell all ranks that this process will not go on, so that they stop now and not at the deadline.

        Raises nothing: it is called when something else went wrong, which may have taken the GPU with it.
        """
        for rank in self._parts.ranks:
            with contextlib.suppress(Exception):
                self._parts.backend.leave(*rank.leaving(self.epoch), why)

    def end(self, *, orderly: bool) -> None:
        """Give memory and threads back; nothing where that was done.

        Args:
            orderly: with all ranks. Else, or after a failed call: at once, and nothing more is raised.
        """
        heap = self._parts.heap
        if heap is None:
            return
        try:
            if orderly and not self.closed:
                self._give_back(heap)
            else:
                self._abandon(heap)
        finally:
            self.closed = self.closed or "close() was called"
            self._parts.drop()

    def _give_back(self, heap: Heap) -> None:
        """Close backend and heap, with all ranks."""
        backend = self._parts.backend
        try:
            backend.synchronize()
            self.epoch = backend.epoch(0, self.epoch)
            backend.close()
        except BaseException:
            self._abandon(heap)
            raise
        heap.close(self._look_at_others)

    def _look_at_others(self) -> None:
        """While this rank waits for the others to close: raise if one has left, or makes a call that this one will not.

        Raises:
            FlashMoEError: as all ranks do then.
        """
        signals = [self._parts.backend.to_host(rank.segments.dispatch_flag) for rank in self._parts.ranks]
        if any((words >> EPOCH_SHIFT > self.epoch).any() for words in signals):
            self.leave(CLOSED_EARLY)
        self.raise_if_given_up()

    def _abandon(self, heap: Heap) -> None:
        """The same after an error, which was told already: tell the others, wait for nobody, and raise nothing more.

        After a call that was given up they know: whoever did so tells all. To ranks of other hosts that takes a while,
        in which this one must not seem to be the first.
        """
        if not self.closed:
            self.leave()
        with contextlib.suppress(Exception):
            self._parts.backend.close()
        heap.close(None)
