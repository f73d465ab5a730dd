"""Ranks as processes of one machine: how they agree while a layer is set up and taken down; never in a call.

MPI's own collectives wait without a limit, so the ones here poll a non-blocking request until a deadline.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SETUP_DEADLINE_S = 600.0  # a rank may compile the kernel meanwhile
CLOSE_DEADLINE_S = 3600.0  # a rank may do much between its last call and its close
TEXT_BYTES = 1000


class Meeting:
    """The ranks of `comm`, an mpi4py communicator."""

    def __init__(self, comm: Any) -> None:
        self.segments: list[Any] = []
        self._comm, request = comm.Idup()  # its messages cannot meet the caller's
        _wait(request, SETUP_DEADLINE_S)
        self.barrier()
        if comm.rank == 0:
            unlink_startup_segment()
        self.num_ranks = comm.size
        self.rank_indices = range(comm.rank, comm.rank + 1)

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
            with contextlib.suppress(Exception):  # the error that is raised next is the one to tell
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

    def from_first(self, make: Callable[[], str]) -> str:
        """Rank 0's text, on all ranks."""
        return self._gather(make() if self._comm.rank == 0 else "")[0]

    def require_one_machine(self) -> None:
        """Raise a ValueError on every rank, if the ranks do not share a machine."""
        from mpi4py import MPI

        local = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        num_local = local.size
        local.Free()
        rule = f"comm must lie on one machine, but {num_local} of {self.num_ranks} ranks share this one"
        self.agree(ValueError(rule) if num_local != self.num_ranks else None)

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
        """Give everything back, which takes all ranks, or with `check=None` leave it to the end of the process.

        Args:
            check: called while waiting for the others; raises if one of them will not come.
        """
        if check is not None and self.segments:
            _wait(self._comm.Ibarrier(), CLOSE_DEADLINE_S, check)
            self._free()
        self.segments = []

    def _free(self) -> None:
        """Give back what this rank holds, as all ranks do now."""
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
