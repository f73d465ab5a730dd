"""Layers on GPUs of several hosts as linked PTX: all ranks are in one launch, each with a GPU of its own.

What the verbs of the network call (build/nvshmem.cu) is compiled and linked as it is, with a stand-in for NVSHMEM's own
device code (nvshmem_stand_in/nvshmem.h), which finds a peer's memory by its address.
"""

import contextlib
import hashlib
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
from pretended_gpus import ImagesHeap

from flashmoe_numba import FlashMoE
from flashmoe_numba.backends.cuda import CudaBackend
from flashmoe_numba.build import build
from flashmoe_numba.build.nvshmem import CUDA_SOURCE, compile_cuda
from flashmoe_numba.gpu.gpu import Gpu
from flashmoe_numba.ptx import simulated
from flashmoe_numba.ptx.linked import linked_ptx

STAND_IN = Path(__file__).parent / "nvshmem_stand_in"
STRIDE, MOST_RANKS = 1 << 18, 8  # as the stand-in has them


def linked_with_stand_in(variant, folder):
    """The variant's kernel as PTX, from `folder` if it is there."""
    stamp = hashlib.sha256((STAND_IN / "nvshmem.h").read_bytes()).hexdigest()[:12]
    with mock.patch.object(build, "network_codes", _codes):
        return linked_ptx(variant, folder / f"stand-in-{stamp}")


def _codes(architecture):
    return [("ltoir", compile_cuda(CUDA_SOURCE, architecture, [STAND_IN]))]


class SymmetricHeap(ImagesHeap):
    """Segments that lie where the stand-in looks for them."""

    def take(self, num_bytes, memory):
        assert num_bytes <= STRIDE and self.num_ranks <= MOST_RANKS
        room = memory.zeros(2 * MOST_RANKS * STRIDE, np.uint8)
        first = -memory.address(room) % (MOST_RANKS * STRIDE)
        return [room[first + rank * STRIDE :][:num_bytes] for rank in range(self.num_ranks)]


@contextlib.contextmanager
def layer_on_hosts(variant, folder, config, weights, hosts, *, seed=0, num_processors=1, change=str, **settings):
    """(layer, simulated GPU)

    Args:
        variant: of forwards.
        folder: for kernels.
        seed: of the machine's schedule.
        change: of a kernel's text.
    """
    assert variant.heap == "nvshmem"
    which = (False, True) if "save" in settings else (False,)
    kernels = {one: linked_with_stand_in(replace(variant, backward=one), folder) for one in which}
    how = dict(seed=seed, blocks_per_gpu=num_processors + 1, multiprocessors=16)
    with (
        mock.patch.object(simulated, "linked_ptx", lambda wanted, _: change(kernels[wanted.backward])),
        simulated.simulated_gpu(variant.architecture, **how) as gpu,
    ):
        heap = SymmetricHeap(config.num_ranks, hosts)
        backend = CudaBackend(config, Gpu(), variant.name.endswith("tf32-nvshmem"), "nvshmem")
        how = dict(num_processors=num_processors) | settings
        with FlashMoE.from_parts(config, weights, heap, backend, **how) as layer:
            assert backend.variant == variant, f"{backend.variant.name} was chosen"
            yield layer, gpu
