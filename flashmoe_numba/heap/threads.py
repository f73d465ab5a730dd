"""All ranks in one process: a segment is an array."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np

from reference import Hosts
from reference.arrays import Array
from reference.layout import ALIGNMENT

from ..processes.ownership import Owned
from .protocols import Memory

T = TypeVar("T")


class ThreadHeap(Owned):
    """Segments of `num_ranks` ranks of this process.

    Args:
        hosts: which ranks are to share one; a rank then reaches no other's memory than that of these, and its backend
            must carry puts (`FiberBackend` does). None: all do.
    """

    all_here, first_here = True, 0

    def __init__(self, num_ranks: int, hosts: Hosts | None = None) -> None:
        self.num_ranks = num_ranks
        self.rank_indices = range(num_ranks)
        self.hosts = hosts or Hosts.one(num_ranks)
        if len(self.hosts.of_rank) != num_ranks:
            raise ValueError(f"hosts must be of num_ranks={num_ranks} ranks, got {len(self.hosts.of_rank)}")
        self.segments: list[Array] = []
        self._seen: list[list[Array]] = []  # by each rank, where there are several

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
            if not self.hosts.is_one:
                self._seen = [self._seen_by(rank_idx, num_bytes) for rank_idx in range(self.num_ranks)]
        except (MemoryError, OverflowError, ValueError):
            need = f"the segments of {self.num_ranks} ranks need {num_bytes / 2**30:,.1f} GiB each"
            cure = "use a smaller config.num_tokens or a config.capacity; `flashmoe plan` shows what they need"
            raise MemoryError(f"{need}, more than this machine gives: {cure}") from None

    def _seen_by(self, rank_idx: int, num_bytes: int) -> list[Array]:
        return [
            _aligned_zeros(num_bytes) if self.hosts.are_apart(rank_idx, peer) else segment
            for peer, segment in enumerate(self.segments)
        ]

    def segments_of(self, rank_idx: int) -> list[Array]:
        return self.segments if self.hosts.is_one else self._seen[rank_idx]

    def carry(self, control_at: int, wires: Sequence[Array], most_bytes: int) -> None:
        """Nothing is carried."""

    def carrying(self, deadline_s: float) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self, check: Callable[[], None] | None) -> None:
        self.segments, self._seen = [], []


def _aligned_zeros(num_bytes: int) -> Array:
    raw = np.zeros(num_bytes + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + num_bytes]
