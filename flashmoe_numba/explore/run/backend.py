"""The memory of a world's ranks: every run, and every call in it, finds the arrays that the first one was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from reference import MoEConfig
from reference.arrays import Array

from ...backends.fibers import FiberBackend
from ...device.storage import as_storage


class WatchedBackend(FiberBackend):
    """Remembers which arrays begin with whatever was there, and has the arrays of every call ready."""

    def __init__(self) -> None:
        super().__init__()
        self.uninitialised: list[Array] = []
        self._adopted: dict[int, tuple[Array, Array, Array]] = {}  # by id of the tokens
        self._shelves: dict[tuple[int, int], list[Array]] = {}  # by rank and call: what it was given, in order
        self._shelf: list[Array] | None = None
        self._taken = 0

    def begin_call(self, rank_idx: int, call: int) -> None:
        """What is asked for from now on is that of this call."""
        self._shelf, self._taken = self._shelves.setdefault((rank_idx, call), []), 0

    def zeros(self, size: int, dtype: npt.DTypeLike) -> Array:
        return self._take(lambda: super(WatchedBackend, self).zeros(size, dtype))

    def empty(self, size: int, dtype: npt.DTypeLike) -> Array:
        return self._take(lambda: self._uninitialised(super(WatchedBackend, self).empty(size, dtype)))

    def array(self, values: Array) -> Array:
        if self._shelf is None:
            return values
        array = self._take(values.copy)
        array[...] = values
        return array

    def _take(self, make: Callable[[], Array]) -> Array:
        if self._shelf is None:
            return make()
        if self._taken == len(self._shelf):
            self._shelf.append(make())
        self._taken += 1
        return self._shelf[self._taken - 1]

    def _uninitialised(self, array: Array) -> Array:
        self.uninitialised.append(array)
        return array

    def note_filled(self, array: Array) -> None:
        """The host writes it before any kernel reads it."""
        self.uninitialised = [other for other in self.uninitialised if other is not array]

    def make_scratch(self, config: MoEConfig) -> Any:
        scratch = super().make_scratch(config)
        self.uninitialised += scratch
        return scratch

    def expect(self, x: Array) -> tuple[Array, Array]:
        """(tokens, room for results) of a call with these tokens, as the kernel will see them."""
        tokens, room = as_storage(x), self._uninitialised(as_storage(np.empty_like(x)))
        self._adopted[id(x)] = tokens, room, room.view(x.dtype).reshape(x.shape)
        return tokens, room

    def adopt(self, x: Array) -> tuple[Array, Array, Array]:
        return self._adopted[id(x)]
