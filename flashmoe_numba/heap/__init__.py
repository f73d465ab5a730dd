"""Memory: a rank's arrays, and symmetric heaps, one segment per rank, all of one size, all visible to every rank.

What a memory and a heap give is said in `protocols`.
"""

from __future__ import annotations

from typing import Any

from reference import MoEConfig

from ..processes.meeting import argument_of
from .protocols import Heap
from .threads import ThreadHeap


def make_heap(config: MoEConfig, comm: Any, backend: str, setup_deadline_s: float) -> Heap:
    """A heap without memory yet: of ranks in this process, or of the ranks of an MPI communicator."""
    if backend == "cuda":
        from .gpus import GpuHeap
        from .nvshmem import NvshmemHeap

        return GpuHeap(config.num_ranks) if comm is None else NvshmemHeap(comm, setup_deadline_s)
    if comm is None:
        return ThreadHeap(config.num_ranks)
    if argument_of(comm) == "comm":
        from .hosts import HostsHeap

        return HostsHeap(comm, setup_deadline_s)
    from .mpi import MpiHeap  # a process group has no messages

    return MpiHeap(comm, setup_deadline_s)
