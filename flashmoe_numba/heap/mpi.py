"""Ranks as processes of one machine: a segment is a rank's part of an MPI shared window.

MPI is used to set up and to take down, never in a call. Its own collectives wait without a limit, so the ones here
poll a non-blocking request until a deadline.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHARED_MEMORY = Path("/dev/shm")
SETUP_DEADLINE_S = 600.0  # a rank may compile the kernel meanwhile
CLOSE_DEADLINE_S = 3600.0  # a rank may do much between its last call and its close
TEXT_BYTES = 1000


class MpiHeap:
    """Segments of all ranks of `comm`, an mpi4py communicator whose ranks share one machine."""

    def __init__(self, comm: Any) -> None:
        self._comm, request = comm.Idup()  # its messages cannot meet the caller's
        _wait(request, SETUP_DEADLINE_S)
        self.barrier()
        if comm.rank == 0:
            unlink_startup_segment()
        self.num_ranks = comm.size
        self.rank_indices = range(comm.rank, comm.rank + 1)
        self.segments: list[np.ndarray] = []
        self._window: Any = None

    def agree(self, error: Exception | None, same: str = "") -> None:
        """Raise on every rank if any rank brings an error, or if the ranks do not bring the `same` text.

        Raises:
            Exception: this rank's own error.
            RuntimeError: another rank's error, quoted.
            ValueError: this rank's text is not rank 0's.
        """
        everybody = self._gather(f"rank {self._comm.rank}: {error}" if error is not None else "")
        texts = self._gather(same)
        failed = [text for text in everybody if text]
        different = [rank_idx for rank_idx, text in enumerate(texts) if text != texts[0]]
        if failed or different:
            self._free()  # as all ranks do now
        if error is not None:
            raise error
        if failed:
            raise RuntimeError(f"another rank could not start: {failed[0]}")
        if different:
            other = different[0]
            raise ValueError(
                f"all ranks must be given the same: rank 0 has {texts[0]}, rank {other} has {texts[other]}"
            )

    def allocate(self, num_bytes: int) -> None:
        """Take zeroed segments of `num_bytes` each. The system gives memory as it is touched.

        Raises:
            ValueError: ranks on several machines, or not enough shared memory.
        """
        from mpi4py import MPI

        self.agree(self._shortage(num_bytes))
        self._window = MPI.Win.Allocate_shared(num_bytes, 1, comm=self._comm)
        views = [self._window.Shared_query(rank_idx)[0] for rank_idx in range(self.num_ranks)]
        self.segments = [np.frombuffer(view, np.uint8)[:num_bytes] for view in views]
        self.barrier()

    def _shortage(self, num_bytes: int) -> ValueError | None:
        """MPI would hand out more than there is, and the process would die at the first touch of a missing page."""
        from mpi4py import MPI

        local = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        num_local = local.size
        local.Free()
        if num_local != self.num_ranks:
            return ValueError(f"comm must lie on one machine, but {num_local} of {self.num_ranks} ranks share this one")
        if self._comm.rank == 0 and SHARED_MEMORY.is_dir():
            status = os.statvfs(SHARED_MEMORY)
            needed, free = num_bytes * self.num_ranks, status.f_bavail * status.f_frsize
            if needed > free:
                return ValueError(
                    f"the segments of {self.num_ranks} ranks need {needed / 2**20:.0f} MiB of shared memory, but "
                    f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB left: use fewer tokens or a capacity, or enlarge it"
                )
        return None

    def from_first(self, make: Callable[[], str]) -> str:
        """Rank 0's text, on all ranks."""
        return self._gather(make() if self._comm.rank == 0 else "")[0]

    def _gather(self, text: str) -> list[str]:
        """Everybody's text, cut to `TEXT_BYTES`."""
        mine = np.zeros(TEXT_BYTES, np.uint8)
        data = np.frombuffer(text.encode()[:TEXT_BYTES], np.uint8)
        mine[: data.size] = data
        everybody = np.empty((self.num_ranks, mine.size), np.uint8)
        _wait(self._comm.Iallgather(mine, everybody), SETUP_DEADLINE_S)
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in everybody]

    def barrier(self) -> None:
        """Wait for all ranks.

        Raises:
            TimeoutError: some rank did not come.
        """
        _wait(self._comm.Ibarrier(), SETUP_DEADLINE_S)

    def close(self, check: Callable[[], None] | None) -> None:
        """Give the window back, which takes all ranks, or with `check=None` leave it to the end of the process.

        Args:
            check: called while waiting for the others; raises if one of them will not come.
        """
        if check is not None and self.segments:
            _wait(self._comm.Ibarrier(), CLOSE_DEADLINE_S, check)
            self._free()
        self.segments = []

    def _free(self) -> None:
        """Give back what MPI gave; takes all ranks."""
        self.segments = []
        if self._window is not None:
            self._window.Free()
        self._comm.Free()


def _wait(request: Any, deadline_s: float, check: Callable[[], None] = lambda: None) -> None:
    start, nap = time.monotonic(), 1e-5
    while not request.Test():
        check()
        if time.monotonic() - start > deadline_s:
            raise TimeoutError(f"not all ranks came to a collective of the layer within {deadline_s:g} s")
        time.sleep(nap)
        nap = min(2 * nap, 0.01)


def unlink_startup_segment() -> None:
    """Take the name off mpich's own segment once all ranks have it, so that no death leaves it behind."""
    with contextlib.suppress(OSError):
        maps = Path("/proc/self/maps").read_text()
        for name in set(re.findall(r"/dev/shm/mpich_shm_\w+", maps)):
            Path(name).unlink()
