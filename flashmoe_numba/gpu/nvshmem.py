"""NVSHMEM by nvshmem4py: memory of GPUs on several hosts. The one module that imports it.

A process begins NVSHMEM once, for one GPU and one group of ranks, and does not end it, which would take all ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..processes.ownership import Owned
from .gpu import Gpu

FIX = "pip install 'flashmoe-numba[nvshmem]'"
OF_CORE = (
    "InitStatus", "NvshmemError", "SignalOp", "buffer", "free", "get_peer_buffer", "get_unique_id", "init", "my_pe",
    "n_pes",
)  # fmt: skip
OF_BINDINGS = ("cumodule_init", "init_status", "putmem_signal_on_stream")  # what is used of nvshmem4py


class Nvshmem(Owned):
    """One allocation of symmetric memory, on this process's GPU.

    Raises:
        ImportError: nvshmem4py or NVSHMEM is missing or too old; names the extra.
    """

    def __init__(self, gpu: Gpu) -> None:
        try:
            from cuda import core as cuda_core
            from nvshmem import bindings, core
        except ImportError as error:
            raise ImportError(f"GPUs on several hosts need NVSHMEM and nvshmem4py: {FIX} ({error})") from error
        missing = [name for name in OF_CORE if not hasattr(core, name)]
        missing += [name for name in OF_BINDINGS if not hasattr(bindings, name)]
        if missing:
            raise ImportError(f"nvshmem4py must be 0.4 or newer, and this one has no {', '.join(missing)}: {FIX}")
        self._gpu, self._cuda, self._core, self._bindings = gpu, cuda_core, core, bindings
        self._buffer: Any = None

    def new_id(self) -> str:
        """By which ranks find each other: one of them makes it, and tells the others."""
        return bytes(self._core.get_unique_id()._data.view(np.uint8)).hex()

    def begin(self, rank_idx: int, num_ranks: int, group_id: str) -> None:
        """Meet the other ranks, as they all do now; nothing, if the process has met them before.

        Raises:
            ValueError: it has met others.
        """
        with self._gpu.here:
            unique_id = self._core.get_unique_id(empty=True)  # loads the library, too
            if self._bindings.init_status() >= self._core.InitStatus.STATUS_IS_INITIALIZED:
                self._check_same(rank_idx, num_ranks)
                return
            unique_id._data.view(np.uint8)[...] = np.frombuffer(bytes.fromhex(group_id), np.uint8)
            device = self._cuda.Device(self._gpu.device)
            device.set_current()
            self._core.init(device=device, uid=unique_id, rank=rank_idx, nranks=num_ranks, initializer_method="uid")

    def _check_same(self, rank_idx: int, num_ranks: int) -> None:
        before = self._core.my_pe(), self._core.n_pes()
        if before != (rank_idx, num_ranks):
            rule = "comm must have the same ranks, in the same order, in all layers of a process on several hosts"
            was = f"rank {before[0]} of {before[1]} before"
            raise ValueError(f"{rule}: this one is rank {rank_idx} of {num_ranks}, and was {was}")

    def take(self, num_bytes: int) -> int:
        """The address of zeroed memory, as all ranks take it now.

        Raises:
            MemoryError: there is not so much; on every rank.
        """
        with self._gpu.here:
            try:
                self._buffer = self._core.buffer(num_bytes)
            except self._core.NvshmemError:
                cure = "see NVSHMEM_MAX_MEMORY_PER_GPU, or NVSHMEM_SYMMETRIC_SIZE where it maps no memory on demand"
                raise MemoryError(f"NVSHMEM has no {num_bytes / 2**30:.2f} GiB on {self._gpu.name}: {cure}") from None
            address = int(self._buffer.handle)
            self._gpu.view(address, num_bytes)[...] = 0
            self._gpu.synchronize()
            return address

    def address_of(self, rank_idx: int) -> int | None:
        """Where a rank's memory is mapped here, if it is."""
        with self._gpu.here:
            try:
                return int(self._core.get_peer_buffer(self._buffer, rank_idx).handle)
            except self._core.NvshmemError:
                return None

    def give_back(self) -> None:
        """Free the memory, as all ranks do now."""
        if self._buffer is not None:
            with self._gpu.here:
                self._core.free(self._buffer)
            self._buffer = None

    def admit(self, module: int) -> None:
        """Let the kernels of a loaded module (CUmodule) reach other ranks.

        Raises:
            RuntimeError: NVSHMEM refused.
        """
        with self._gpu.here:
            if status := self._bindings.cumodule_init(module):
                rule = "its library must be of the version whose headers kernels are built with: `flashmoe doctor`"
                raise RuntimeError(f"NVSHMEM refused the kernel, nvshmemx_cumodule_init gave {status}; {rule}")

    def put_signal(self, target: int, source: int, num_bytes: int, flag: int, word: int, rank_idx: int) -> None:
        """Put bytes into a rank's memory and then a word, beside whatever kernel runs; addresses are this rank's."""
        set_it = int(self._core.SignalOp.SIGNAL_SET)
        with self._gpu.here, self._gpu.beside() as stream:
            self._bindings.putmem_signal_on_stream(target, source, num_bytes, flag, word, set_it, rank_idx, stream)
