"""Ranks on one GPU that are on several hosts, as far as they can tell, with a stand-in for NVSHMEM's heap."""

import numpy as np

from flashmoe_numba.backends.cuda import CudaBackend
from flashmoe_numba.heap.gpus import GpuHeap
from flashmoe_numba.heap.nvshmem import image_at
from reference.layout import CONTROL_BYTES


class ImagesHeap(GpuHeap):
    """Segments with images behind them, as `NvshmemHeap` has them."""

    def allocate(self, num_bytes, memory):
        self.taken = self.take(image_at(num_bytes, self.num_ranks), memory)
        self.segments = [taken[:num_bytes] for taken in self.taken]
        self._seen = [
            [self._seen_by(rank, peer, num_bytes) for peer in range(self.num_ranks)] for rank in range(self.num_ranks)
        ]

    def take(self, num_bytes, memory):
        return [memory.zeros(num_bytes, np.uint8) for _ in range(self.num_ranks)]

    def _seen_by(self, rank, peer, num_bytes):
        if not self.hosts.are_apart(rank, peer):
            return self.segments[peer]
        return self.taken[rank][image_at(CONTROL_BYTES, peer) :][:num_bytes]


class PretendingBackend(CudaBackend):
    """Kernels find the peers' segments behind what else they know of the network. Of these `heap`."""

    heap: ImagesHeap

    def make_wire(self, num_words, own, layout, rank_idx):
        segments = [self.address(segment) for segment in self.heap.segments]
        words = self.to_host(super().make_wire(num_words, own, layout, rank_idx))
        return self.array(np.concatenate([words, np.array(segments, np.uint64)]))
