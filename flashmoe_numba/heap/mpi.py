"""Ranks as processes of one machine: a segment is a rank's part of an MPI shared window."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .meeting import Meeting

SHARED_MEMORY = Path("/dev/shm")


class MpiHeap(Meeting):
    """Segments of all ranks of `comm`, an mpi4py communicator whose ranks share one machine."""

    def __init__(self, comm: Any, setup_deadline_s: float) -> None:
        super().__init__(comm, setup_deadline_s)
        self._window: Any = None

    def allocate(self, num_bytes: int, backend: Any) -> None:
        """Take zeroed segments of `num_bytes` each. The system gives memory as it is touched.

        Raises:
            ValueError: ranks on several machines, or not enough shared memory.
        """
        from mpi4py import MPI

        self.require_one_machine()
        self.agree(self._shortage(num_bytes))
        self._window = MPI.Win.Allocate_shared(num_bytes, 1, comm=self._comm)
        views = [self._window.Shared_query(rank_idx)[0] for rank_idx in range(self.num_ranks)]
        self.segments = [np.frombuffer(view, np.uint8)[:num_bytes] for view in views]
        self.barrier()

    def _shortage(self, num_bytes: int) -> ValueError | None:
        """MPI would hand out more than there is, and the process would die at the first touch of a missing page."""
        if self._comm.rank == 0 and SHARED_MEMORY.is_dir():
            status = os.statvfs(SHARED_MEMORY)
            needed, free = num_bytes * self.num_ranks, status.f_bavail * status.f_frsize
            if needed > free:
                return ValueError(
                    f"the segments of {self.num_ranks} ranks need {needed / 2**20:.0f} MiB of shared memory, but "
                    f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB left: use fewer tokens or a capacity, or enlarge it"
                )
        return None

    def _free(self) -> None:
        self.segments = []  # views of the window
        if self._window is not None:
            self._window.Free()
        super()._free()
