"""Memory for new gradients of weights: that of earlier ones which nobody has any more, where there is such.

The system fills memory with zeros before it gives it, page by page while a task waits for it, which takes as long as
the sums themselves where tokens are few. Memory that was used before is not filled: a call that begins its sums stores
them (`Problem.fresh`), and those of experts without rows, which no task stores, are cleared.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from reference.arrays import Array

from ..kernel.backward.state import WeightGradients
from .protocols import Memory

LARGE = ("up", "down")  # of WeightGradients: whose memory is used again


class Sums:
    """Of one rank's packed weights. It holds the memory of one set of gradients at most, beside those that users have.

    None where most experts had no rows in the last call: to clear theirs takes longer than new memory does.
    """

    def __init__(self) -> None:
        self._free: dict[str, Array] = {}
        self._most_had_rows = True

    def take(self, memory: Memory, sizes: Mapping[str, int], dtype: np.dtype[Any]) -> tuple[WeightGradients, bool]:
        """(arrays for a call that begins its sums, is there something in the large ones?): else all are zeros.

        Args:
            sizes: of `gradient_sizes`.
        """
        arrays, used = {}, False
        for name, size in sizes.items():
            room = self._free.pop(name, None) if size else None
            used = used or room is not None
            array = memory.zeros(size, dtype) if room is None else room
            lent = name in LARGE and size > 0
            arrays[name] = memory.lend(array, partial(self._give_back, name)) if lent else array
        return WeightGradients(**arrays), used

    def _give_back(self, name: str, array: Array) -> None:
        if self._most_had_rows:
            self._free[name] = array

    def settle(self, gradients: WeightGradients, used: bool, idle: Array) -> None:
        """After the call: zeros for what no task has stored.

        Args:
            gradients, used: what `take` returned.
            idle: `[experts_per_rank]`, bool: had the expert no rows?
        """
        self._most_had_rows = 2 * int(idle.sum()) <= len(idle)
        for name in LARGE if used else ():
            getattr(gradients, name).reshape(len(idle), -1)[idle] = 0
