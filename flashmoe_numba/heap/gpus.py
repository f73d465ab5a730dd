"""Segments in GPU memory: of all ranks on one GPU, or one GPU per rank with peers' memory mapped through IPC."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..gpu.gpu import Gpu
from ..processes.meeting import Meeting
from .protocols import Memory
from .threads import ThreadHeap


@runtime_checkable
class OnGpu(Protocol):
    """A memory that says on which GPU it is."""

    @property
    def gpu(self) -> Gpu: ...


class GpuHeap(ThreadHeap):
    """Segments of `num_ranks` ranks of this process, all on one GPU."""

    def allocate(self, num_bytes: int, memory: Memory) -> None:
        """Take zeroed segments of `num_bytes` each.

        Raises:
            MemoryError: how much is needed and how much is free.
        """
        self.segments = [memory.zeros(num_bytes, np.uint8) for _ in range(self.num_ranks)]


class GpuIpcHeap(Meeting):
    """Segments of all ranks of `comm`; each rank allocates its own and maps those of the others.

    A handle stands for a whole allocation, so a segment is one of its own and not a part of a pool's.
    """

    def __init__(self, comm: Any, setup_deadline_s: float) -> None:
        super().__init__(comm, setup_deadline_s)
        self._gpu: Gpu
        self._own: Any = None
        self._mapped: list[int] = []

    def allocate(self, num_bytes: int, memory: Memory) -> None:
        """Take a zeroed segment of `num_bytes`, and map everybody's.

        Raises:
            ValueError: ranks on several machines, or two GPUs that cannot reach each other's memory.
            MemoryError: how much is needed and how much is free.
        """
        if not isinstance(memory, OnGpu):
            raise TypeError(f"backend must be on a GPU for segments that GPUs share, got {type(memory).__name__}")
        self._gpu = memory.gpu
        self.require_one_machine()
        self.agree(self._missing_access())
        self.together(lambda: self._allocate_own(num_bytes))
        handles = self._gather_bytes(self._gpu.ipc_handle(self._own))
        self.together(lambda: self._map(handles, num_bytes))

    def _missing_access(self) -> ValueError | None:
        blocked = [bus_id for bus_id in self._gather(self._gpu.bus_id()) if not self._gpu.can_access(bus_id)]
        if not blocked:
            return None
        rule = "every process must see all GPUs, and each reach the memory of every other: `flashmoe doctor` shows it"
        return ValueError(f"GPU {self._gpu.bus_id()} cannot reach the memory of GPU {blocked[0]}; {rule}")

    def _allocate_own(self, num_bytes: int) -> None:
        self._own = self._gpu.allocate_alone(num_bytes)

    def _map(self, handles: list[bytes], num_bytes: int) -> None:
        for rank_idx, handle in enumerate(handles):
            if rank_idx == self.rank_indices[0]:  # a process cannot open its own handle
                self.segments.append(self._own)
            else:
                self._mapped.append(self._gpu.open_ipc(handle))
                self.segments.append(self._gpu.view(self._mapped[-1], num_bytes))

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        return [bytes.fromhex(text) for text in self._gather(data.hex())]

    def _free(self) -> None:
        """Unmap the others' segments; when all ranks have, free this one's.

        Every rank comes to the barrier, whatever it holds and whatever failed: the others wait there.
        """
        self.segments = []
        try:
            for address in self._mapped:
                self._gpu.close_ipc(address)
        finally:
            self._mapped = []
            self.barrier()
        if self._own is not None:
            self._gpu.free_alone(self._own)
            self._own = None
        super()._free()
