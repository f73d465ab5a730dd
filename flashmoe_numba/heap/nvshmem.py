"""Segments in GPU memory of several hosts: NVSHMEM takes them, of one size and at the same place on every rank.

Where all ranks are on one host, they are mapped by IPC, without NVSHMEM.

A rank reaches the segments of its own host, as by IPC. Into those of other hosts its kernel puts rows. There it shows
its control words, too, some of them now and then and all of them when it gives up: behind each segment lie *images* of
them, one for every rank.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np

from reference import Hosts, Layout
from reference.layout import CONTROL_BYTES, FLAG_BYTES

from ..gpu.nvshmem import Nvshmem
from ..kernel.control import PROGRESS, SILENT
from .gpus import GpuIpcHeap, OnGpu
from .protocols import Memory


@runtime_checkable
class OnNetwork(OnGpu, Protocol):
    """A memory on a GPU that has kernels which reach other hosts."""

    def join_network(self, nvshmem: Nvshmem) -> None:
        """Let these kernels reach the ranks that have met by it.

        Raises:
            ValueError: they were built to reach none.
        """


# words of `wire`, in place of a ring of puts (build/nvshmem.cu)
LAST_NS, OWN, CONTROL_AT, CONTROL_SIZE, IMAGE_AT, SHOWN_AT, SHOWN_SIZE = range(7)


def wire_words(address: int, layout: Layout, rank_idx: int) -> np.ndarray:
    """What a rank's kernel must know to reach ranks of other hosts by NVSHMEM.

    Args:
        address: of its segment.
    """
    words = np.zeros(SHOWN_SIZE + 1, np.uint64)
    words[OWN] = address
    words[CONTROL_AT], words[CONTROL_SIZE] = layout.control, CONTROL_BYTES
    words[IMAGE_AT] = image_at(layout.num_bytes, rank_idx)
    words[SHOWN_AT], words[SHOWN_SIZE] = FLAG_BYTES * PROGRESS, FLAG_BYTES * (SILENT + 1 - PROGRESS)
    return words


def image_at(num_bytes: int, rank_idx: int) -> int:
    """Where the image of a rank's control words is, behind a segment of so many bytes."""
    return num_bytes + rank_idx * CONTROL_BYTES


class NvshmemHeap(GpuIpcHeap):
    """Segments of all ranks of `comm`, on whatever hosts.

    Args:
        hosts: which ranks share one; None: by what their machines are called.
    """

    def __init__(self, comm: Any, setup_deadline_s: float, hosts: Hosts | None = None) -> None:
        super().__init__(comm, setup_deadline_s)
        self.hosts = hosts or self.hosts
        self._nvshmem: Nvshmem | None = None

    def allocate(self, num_bytes: int, memory: Memory) -> None:
        """Take a zeroed segment of `num_bytes`, and learn where those of this host are.

        Raises:
            ImportError: nvshmem4py or NVSHMEM is missing; names the extra.
            ValueError: two GPUs of a host that cannot reach each other's memory, or other ranks than before.
            MemoryError: there is not so much.
        """
        if self.hosts.is_one:
            super().allocate(num_bytes, memory)
            return
        if not isinstance(memory, OnNetwork):
            raise TypeError(f"backend must be on a GPU for segments of several hosts, got {type(memory).__name__}")
        gpu, rank_idx = memory.gpu, self.rank_indices[0]
        nvshmem = self.together(lambda: Nvshmem(gpu))
        group_id = self._gather(self.together(lambda: "" if rank_idx else nvshmem.new_id()))[0]
        self.together(lambda: nvshmem.begin(rank_idx, self.num_ranks, group_id))
        own = self.together(lambda: nvshmem.take(image_at(num_bytes, self.num_ranks)))
        self._nvshmem = nvshmem  # not before: to give memory back takes all ranks
        addresses = self.together(lambda: [self._address(nvshmem, own, peer) for peer in range(self.num_ranks)])
        self.segments = [gpu.view(address, num_bytes) for address in addresses]
        self.together(lambda: memory.join_network(nvshmem))

    def _address(self, nvshmem: Nvshmem, own: int, peer: int) -> int:
        """Where a rank's segment is seen; one that ends with its image here, if the rank is on another host."""
        if self.hosts.are_apart(self.rank_indices[0], peer):
            return own + image_at(CONTROL_BYTES, peer)
        address = own if peer == self.rank_indices[0] else nvshmem.address_of(peer)
        if address is None:
            rule = "GPUs of a host must reach each other's memory: `flashmoe doctor` shows which do"
            raise ValueError(f"NVSHMEM maps no memory of rank {peer} on this host; {rule}")
        return address

    def _free(self) -> None:
        """Forget the segments; when all ranks have, give them back."""
        if self._nvshmem is not None:
            self.segments = []
            self.barrier()
            self._nvshmem.give_back()
            self._nvshmem = None
        super()._free()
