"""All ranks in one process: a segment is an array."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from reference.arrays import Array
from reference.layout import ALIGNMENT

from ..processes.ownership import Owned
from .protocols import Memory

T = TypeVar("T")


class ThreadHeap(Owned):
    """Segments of `num_ranks` ranks of this process."""

    all_here = True

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.rank_indices = range(num_ranks)
        self.segments: list[Array] = []

    def agree(self, error: Exception | None, same: Mapping[str, Any] | None = None) -> None:
        if error is not None:
            raise error

    def together(self, step: Callable[[], T]) -> T:
        return step()

    def from_first(self, make: Callable[[], str]) -> str:
        return make()

    def allocate(self, num_bytes: int, memory: Memory) -> None:
        """Take zeroed segments of `num_bytes` each. The system gives memory as it is touched.

        Raises:
            MemoryError: it will never have that much.
        """
        try:
            self.segments = [_aligned_zeros(num_bytes) for _ in range(self.num_ranks)]
        except (MemoryError, OverflowError, ValueError):
            need = f"the segments of {self.num_ranks} ranks need {num_bytes / 2**30:,.1f} GiB each"
            cure = "use a smaller config.num_tokens or a config.capacity; `flashmoe plan` shows what they need"
            raise MemoryError(f"{need}, more than this machine gives: {cure}") from None

    def close(self, check: Callable[[], None] | None) -> None:
        self.segments = []


def _aligned_zeros(num_bytes: int) -> Array:
    raw = np.zeros(num_bytes + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + num_bytes]
