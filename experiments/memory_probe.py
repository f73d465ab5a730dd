"""How fast this machine reads memory: threads that stream blocks of a large buffer, each the next one that is left.

Reads go on where the last one ended, so that what is read was not read for as long as the buffer is large.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

BLOCK_BYTES = 1 << 20  # 30 us at 34 GB/s: so long a thread may wait for the last block of another


@njit("int64(int64[::1])", nogil=True)
def add_up(words):
    """Reads all; the sum keeps the loop alive."""
    total = 0
    for i in range(words.size):
        total += words[i]
    return total


class MemoryProbe:
    """Reads by `threads` threads, of which the caller's is one.

    Args:
        num_bytes: of the buffer, rounded up to whole blocks.
    """

    def __init__(self, num_bytes: int, threads: int) -> None:
        self._blocks = np.ones((-(-num_bytes // BLOCK_BYTES), BLOCK_BYTES // 8), np.int64)
        self._helpers = ThreadPoolExecutor(max(1, threads - 1))
        self._threads, self._next = threads, 0

    def read(self, num_bytes: int) -> int:
        """The sum of so many bytes' words, which is how many there are: all are 1."""
        count = -(-num_bytes // BLOCK_BYTES)
        blocks = [self._blocks[(self._next + i) % len(self._blocks)] for i in range(count)]
        blocks[-1] = blocks[-1][: (num_bytes - (count - 1) * BLOCK_BYTES) // 8]
        self._next += count
        left = iter(blocks)
        helpers = [self._helpers.submit(_read_all, left) for _ in range(self._threads - 1)]
        return _read_all(left) + sum(helper.result() for helper in helpers)


def _read_all(blocks: Iterator[np.ndarray]) -> int:
    """Sum of the words of all that this thread gets; a list's iterator gives each to one thread only."""
    return sum(add_up(block) for block in blocks)
