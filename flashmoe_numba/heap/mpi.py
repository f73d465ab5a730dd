"""Ranks as processes of one machine: a segment is a rank's part of a file in shared memory that all of them map.

The file is ours, not a window of MPI's, because others must see how much of it is claimed and not touched yet (see
processes/shared_memory.py): whoever maps it keeps it open. It has a name only until all ranks have opened it, and has
no size before that, so that no death leaves memory behind.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from reference.arrays import Array

from ..processes import shared_memory
from ..processes.meeting import Meeting
from .protocols import Memory

CURE = "use a smaller config.num_tokens, a config.capacity, close other layers, or enlarge it"


class MpiHeap(Meeting):
    """Segments of all ranks of `comm`, an mpi4py communicator whose ranks share one machine."""

    def allocate(self, num_bytes: int, memory: Memory | None = None) -> None:
        """Take zeroed segments of `num_bytes` each. The system gives memory as it is touched.

        Raises:
            ValueError: ranks on several machines, or not enough shared memory.
        """
        self.require_one_machine()
        self.segments = self._share(self.num_ranks, num_bytes)
        self.barrier()

    def _share(self, num_ranks: int, num_bytes: int) -> list[Array]:
        """Segments of this host's ranks, of which there are so many."""
        stride = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        folder = shared_memory.FOLDER if shared_memory.FOLDER.is_dir() else Path(tempfile.gettempdir())
        with ExitStack() as stack:
            file = self._open_together(folder, stack)
            self._claim(file, num_ranks, stride, folder)
            mapped = self.together(lambda: mmap.mmap(file.fileno(), stride * num_ranks))
        return [np.frombuffer(mapped, np.uint8, num_bytes, i * stride) for i in range(num_ranks)]

    def _open_together(self, folder: Path, opened: ExitStack) -> BinaryIO:
        """One empty file of a host, opened by every rank there; without a name when this returns."""
        with ExitStack() as named:
            name = self.from_first(lambda: _make_file(folder, named))
            return self.together(lambda: opened.enter_context(open(name, "r+b")))

    def _claim(self, file: BinaryIO, num_ranks: int, stride: int, folder: Path) -> None:
        """Give the file its size. The system would also give one beyond what there is, and ranks die as they touch it.

        Raises:
            Shortage: on every rank, if there is not enough.
        """

        def try_to_claim() -> str:
            try:
                who = f"the segments of {num_ranks} ranks need"
                return str(shared_memory.claim(file.fileno(), num_ranks * stride, who, CURE, folder) or "")
            except OSError as error:
                return str(error)

        problem = self.from_first(try_to_claim)
        self.agree(shared_memory.Shortage(problem) if problem else None)


def _make_file(folder: Path, named: ExitStack) -> str:
    """The name of a new empty file, which it loses when `named` closes."""
    descriptor, name = tempfile.mkstemp(prefix="flashmoe_", dir=folder)
    os.close(descriptor)
    named.callback(_unlink, name)
    return name


def _unlink(name: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name)
