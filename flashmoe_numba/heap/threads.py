"""All ranks in one process: a segment is an array."""

from __future__ import annotations

import numpy as np

from reference.layout import ALIGNMENT


class ThreadHeap:
    """Segments of `num_ranks` ranks of this process, zeroed. Memory is taken as it is touched."""

    def __init__(self, num_ranks: int, num_bytes: int) -> None:
        self.num_ranks = num_ranks
        self.rank_indices = range(num_ranks)
        self.segments = [_aligned_zeros(num_bytes) for _ in range(num_ranks)]

    def agree(self, error: Exception | None) -> None:
        """Raise this rank's error, if there is one."""
        if error is not None:
            raise error

    def barrier(self) -> None:
        """Nothing to wait for: there is one process."""

    def close(self, *, orderly: bool) -> None:
        self.segments = []


def _aligned_zeros(num_bytes: int) -> np.ndarray:
    raw = np.zeros(num_bytes + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + num_bytes]
