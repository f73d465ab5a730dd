"""One GPU through CuPy: memory, mappings of other processes' memory, streams, launches. The one module that imports it.

Memory for arrays comes from CuPy's pool, except what other processes map.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

H2D, D2H = 1, 2  # cudaMemcpyKind
MAP_BYTES = 128
OWN_BYTES = 2 << 20  # the driver puts smaller allocations together into one of this size, which IPC would share whole


class Gpu:
    """A device of this machine.

    Args:
        device: its index; None is CuPy's current one.

    Raises:
        ImportError: no CuPy; names the extra.
        RuntimeError: no GPU or no driver, in one line.
        ValueError: there is no such device.
    """

    def __init__(self, device: int | None = None) -> None:
        try:
            import cupy
        except ImportError as error:
            raise ImportError(f"the CUDA backend needs CuPy: pip install 'flashmoe-numba[cuda]' ({error})") from error
        self.cupy, self.runtime = cupy, cupy.cuda.runtime
        try:
            count = self.runtime.getDeviceCount()
        except self.runtime.CUDARuntimeError as error:
            raise RuntimeError(f"backend 'cuda' needs a GPU and its driver: {error}; see `flashmoe doctor`") from None
        if device is None:
            device = self.runtime.getDevice()
        if not 0 <= device < count:
            raise ValueError(f"device must be in [0, {count - 1}], the GPUs of this machine; got {device}")
        self.device = device
        self.here = cupy.cuda.Device(device)
        attributes = self.runtime.getDeviceProperties(device)
        self.name = attributes["name"].decode()
        self.capability = (attributes["major"], attributes["minor"])
        self.multiprocessors = attributes["multiProcessorCount"]
        self.shared_bytes = attributes["sharedMemPerBlockOptin"]

    @staticmethod
    def count() -> int:
        """GPUs of this machine; 0 without a driver."""
        try:
            import cupy

            return int(cupy.cuda.runtime.getDeviceCount())
        except Exception:  # no CuPy, no driver, no GPU: whatever the reason, there is none to use
            return 0

    # memory

    def zeros(self, size: int, dtype: Any) -> Any:
        return self._take(self.cupy.zeros, size, dtype)

    def empty(self, size: int, dtype: Any) -> Any:
        return self._take(self.cupy.empty, size, dtype)

    def _take(self, function: Any, size: int, dtype: Any) -> Any:
        with self.here:
            try:
                return function(size, dtype)
            except self.cupy.cuda.memory.OutOfMemoryError:
                raise self._out_of_memory(size * np.dtype(dtype).itemsize) from None

    def _out_of_memory(self, num_bytes: int) -> MemoryError:
        free, total = self.runtime.memGetInfo()
        has = f"{free / 2**30:.2f} of {total / 2**30:.2f} GiB free"
        return MemoryError(
            f"GPU {self.device} ({self.name}) has {has}, and {num_bytes / 2**30:.2f} GiB more are needed"
        )

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def to_host(self, array: Any) -> np.ndarray:
        """A copy, when all work on the GPU so far is done."""
        with self.here:
            self.runtime.deviceSynchronize()
            return self.cupy.asnumpy(array)

    def store(self, target: Any, values: np.ndarray) -> None:
        """Copy values from the host into an array, in the order of the current stream."""
        with self.here:
            target[...] = self.cupy.asarray(values)

    def to_device(self, array: Any) -> Any:
        """The array on this GPU, contiguous: a NumPy array is copied there, one that is there stays."""
        if isinstance(array, np.ndarray):
            with self.here:
                return self.cupy.asarray(np.ascontiguousarray(array))
        return self.cupy.ascontiguousarray(array)

    def read_now(self, array: Any) -> np.ndarray:
        """A copy of an array as it is at this moment, beside whatever kernel runs."""
        copy = np.empty(array.shape, array.dtype)
        with self.here, self.cupy.cuda.Stream(non_blocking=True) as stream:
            self.runtime.memcpyAsync(copy.ctypes.data, self.address(array), copy.nbytes, D2H, stream.ptr)
            stream.synchronize()
        return copy

    def write_word(self, address: int, value: int) -> None:
        """Store an int64 at once, beside whatever kernel runs."""
        word = np.array([value], np.int64)
        with self.here, self.cupy.cuda.Stream(non_blocking=True) as stream:
            self.runtime.memcpyAsync(address, word.ctypes.data, 8, H2D, stream.ptr)
            stream.synchronize()

    # memory of other processes

    def allocate_alone(self, num_bytes: int) -> Any:
        """Zeroed bytes in an allocation of their own."""
        with self.here:
            try:
                address = self.runtime.malloc(-(-num_bytes // OWN_BYTES) * OWN_BYTES)
            except self.runtime.CUDARuntimeError:
                raise self._out_of_memory(num_bytes) from None
            segment = self.view(address, num_bytes)
            segment[...] = 0
            self.runtime.deviceSynchronize()
            return segment

    def free_alone(self, segment: Any) -> None:
        with self.here:
            self.runtime.free(self.address(segment))

    def view(self, address: int, num_bytes: int) -> Any:
        """Bytes at an address, owned by somebody else."""
        memory = self.cupy.cuda.UnownedMemory(address, num_bytes, self, self.device)
        return self.cupy.ndarray(num_bytes, np.uint8, self.cupy.cuda.MemoryPointer(memory, 0))

    def ipc_handle(self, segment: Any) -> bytes:
        with self.here:
            return bytes(self.runtime.ipcGetMemHandle(self.address(segment)))

    def open_ipc(self, handle: bytes) -> int:
        """Address at which another process's allocation is mapped here; peer access is enabled with it."""
        with self.here:
            return int(self.runtime.ipcOpenMemHandle(handle))

    def close_ipc(self, address: int) -> None:
        with self.here:
            self.runtime.ipcCloseMemHandle(address)

    def bus_id(self) -> str:
        """Which device of the machine it is; unlike its index the same in every process."""
        return str(self.runtime.deviceGetPCIBusId(self.device))

    def can_access(self, bus_id: str) -> bool:
        """Can this GPU read and write that one's memory? Not if this process does not see it."""
        try:
            device = self.runtime.deviceGetByPCIBusId(bus_id)
        except self.runtime.CUDARuntimeError:
            return False
        return device == self.device or bool(self.runtime.deviceCanAccessPeer(self.device, device))

    # tensor maps

    def tensor_map(self, array: Any, shape: Sequence[int], box: Sequence[int]) -> bytes:
        """A CUtensorMap of a contiguous array for tiles with the 128-byte swizzle; what lies outside reads as zero.

        Args:
            array: 16-bit patterns or float32.
            shape, box: of the array and of a tile, the innermost dimension first.
        """
        from cuda.bindings import driver

        kinds = {"uint16": "FLOAT16", "int16": "BFLOAT16", "float32": "TFLOAT32"}
        kind = getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{kinds[array.dtype.name]}")
        strides, bytes_so_far = [], array.dtype.itemsize
        for length in shape[:-1]:
            bytes_so_far *= length
            strides.append(driver.cuuint64_t(bytes_so_far))
        status, encoded = driver.cuTensorMapEncodeTiled(
            kind,
            len(shape),
            self.address(array),
            [driver.cuuint64_t(length) for length in shape],
            strides,
            [driver.cuuint32_t(length) for length in box],
            [driver.cuuint32_t(1)] * len(shape),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"cuTensorMapEncodeTiled refused shape {list(shape)}, box {list(box)}: {status.name}")
        return ctypes.string_at(encoded.getPtr(), MAP_BYTES)

    # kernels

    def load(self, cubin: Path, entry: str, dynamic_shared_bytes: int) -> Any:
        """A kernel for cooperative launches."""
        with self.here:
            module = self.cupy.RawModule(path=str(cubin), enable_cooperative_groups=True)
            function = module.get_function(entry)
            function.max_dynamic_shared_size_bytes = dynamic_shared_bytes
            return function

    def resident_blocks(self, function: Any, threads: int, dynamic_shared_bytes: int) -> int:
        """Blocks that can be on the GPU at the same time."""
        occupancy = self.cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
        with self.here:
            return int(occupancy(function.kernel.ptr, threads, dynamic_shared_bytes)) * int(self.multiprocessors)

    def copy_rows(self, target: Any, rows: np.ndarray, skip: int, stream: int) -> None:
        """Copy `rows` `[n, words]` of int64 to `target` without the first `skip` words of each, in a stream's order.

        The host's array must live until the copy is done where the stream is being captured.
        """
        height, width = rows.shape
        pitch = width * rows.itemsize
        address, source = self.address(target) + 8 * skip, rows.ctypes.data + 8 * skip
        with self.here:
            self.runtime.memcpy2DAsync(address, pitch, source, pitch, pitch - 8 * skip, height, H2D, stream)

    def launch(
        self, function: Any, num_blocks: int, threads: int, arguments: Sequence[int], shared: int, stream: int
    ) -> None:
        """Start a kernel whose arguments are 64-bit integers."""
        words = tuple(np.int64(argument) for argument in arguments)
        with self.here, self.cupy.cuda.ExternalStream(stream, self.device):
            function((num_blocks,), (threads,), words, shared_mem=shared)

    def synchronize(self) -> None:
        with self.here:
            self.runtime.deviceSynchronize()

    def record(self, stream: int) -> Any:
        """An event behind all work in a stream so far."""
        with self.here:
            event = self.cupy.cuda.Event(disable_timing=True)
            event.record(self.cupy.cuda.ExternalStream(stream, self.device))
            return event

    def wait_for(self, event: Any, stream: int) -> None:
        """Let a stream go on only after an event."""
        with self.here:
            self.cupy.cuda.ExternalStream(stream, self.device).wait_event(event)

    def is_capturing(self, stream: int) -> bool:
        """Is the stream being recorded into a CUDA graph?"""
        with self.here:
            return bool(self.cupy.cuda.ExternalStream(stream, self.device).is_capturing())
