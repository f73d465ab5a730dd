"""One GPU through CuPy: memory, mappings of other processes' memory, streams, launches. The one module that imports it.

Memory for arrays comes from CuPy's pool, except what other processes map.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reference.arrays import Array

from ..processes.ownership import Owned
from . import libcuda

H2D, D2H, D2D = 1, 2, 3  # cudaMemcpyKind
SIDE_WORDS = 1024  # most that is read beside a kernel at once: control words, or an address of every rank
OWN_BYTES = 2 << 20  # the driver puts smaller allocations together into one of this size, which IPC would share whole


class Handle:
    """Somebody's stream, as CuPy wants it told."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream


class Gpu(Owned):
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
        self._driver, self._pinned = libcuda.load(), cupy.cuda.PinnedMemoryPool()
        with self.here:  # now, because to make them beside a running kernel may wait for its end
            self._side, self._side_lock = cupy.cuda.Stream(non_blocking=True), threading.Lock()
            self._side_words = self.pinned(SIDE_WORDS, np.int64)

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
            copy: Array = self.cupy.asnumpy(array)
            return copy

    def to_device(self, array: Any) -> Any:
        """The array on this GPU, contiguous: a NumPy array is copied there, one that is there stays."""
        if isinstance(array, np.ndarray):
            with self.here:
                return self.cupy.asarray(np.ascontiguousarray(array))
        with self.here:
            return self.cupy.ascontiguousarray(array)

    def pinned(self, size: int, dtype: Any) -> np.ndarray:
        """Page-locked memory of the host, which copies read and write without anybody waiting for them."""
        with self.here, libcuda.relaxed_capture(self._driver):
            memory = self._pinned.malloc(size * np.dtype(dtype).itemsize)
        return np.frombuffer(memory, dtype, size)

    def copy_in(self, address: int, values: np.ndarray, stream: int) -> None:
        """Copy a pinned array to an address, in a stream's order. It must live until then."""
        with self.here:
            self.runtime.memcpyAsync(address, values.ctypes.data, values.nbytes, H2D, stream)

    def copy_out(self, values: np.ndarray, address: int, stream: int) -> None:
        """Fill a pinned array from an address, in a stream's order."""
        with self.here:
            self.runtime.memcpyAsync(values.ctypes.data, address, values.nbytes, D2H, stream)

    def copy_on_device(self, target: Any, source: Any, stream: int) -> None:
        """Copy a contiguous array into another, in a stream's order."""
        with self.here:
            self.runtime.memcpyAsync(self.address(target), self.address(source), source.nbytes, D2D, stream)

    def read_now(self, address: int, num_words: int) -> np.ndarray:
        """int64 words as they are at this moment, beside whatever kernel runs."""
        with self._side_lock, self.here:
            words = self._side_words[:num_words]
            self.copy_out(words, address, self._side.ptr)
            self._side.synchronize()
            return words.copy()

    def write_word(self, address: int, value: int) -> None:
        """Store an int64 at once, beside whatever kernel runs."""
        with self._side_lock, self.here:
            self._side_words[0] = value
            self.copy_in(address, self._side_words[:1], self._side.ptr)
            self._side.synchronize()

    @contextlib.contextmanager
    def beside(self) -> Iterator[int]:
        """A stream for what is to go on beside whatever kernel runs, and is not waited for."""
        with self._side_lock, self.here:
            yield int(self._side.ptr)

    def module_of(self, function: Any) -> int:
        """The driver's handle (CUmodule) of what a kernel was loaded with."""
        with self.here:
            return int(function.kernel.module.ptr)

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
        """A CUtensorMap of a contiguous array; see `encode_tensor_map`."""
        with self.here:
            return libcuda.encode_tensor_map(self._driver, array.dtype.name, self.address(array), shape, box)

    # kernels

    def load(self, cubin: Path, entry: str, dynamic_shared_bytes: int) -> Any:
        """A kernel for cooperative launches. CuPy gives all layers of one cubin the same, so its limit only grows."""
        with self.here:
            module = self.cupy.RawModule(path=str(cubin), enable_cooperative_groups=True)
            function = module.get_function(entry)
            limit = max(function.max_dynamic_shared_size_bytes, dynamic_shared_bytes)
            function.max_dynamic_shared_size_bytes = limit
            return function

    def resident_blocks(self, function: Any, threads: int, dynamic_shared_bytes: int) -> int:
        """Blocks that can be on the GPU at the same time."""
        occupancy = self.cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
        with self.here:
            return int(occupancy(function.kernel.ptr, threads, dynamic_shared_bytes)) * int(self.multiprocessors)

    def copy_rows(self, target: Any, rows: np.ndarray, skip: int, stream: int) -> None:
        """Copy pinned `rows` `[n, words]` to `target`, but for the first `skip` words of each, in a stream's order.

        They must live until the copy is done, and where the stream is being captured, until the last replay.
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
        with self.here, self._stream(stream):
            function((num_blocks,), (threads,), words, shared_mem=shared)

    def synchronize(self) -> None:
        with self.here:
            self.runtime.deviceSynchronize()

    # streams

    def _stream(self, stream: int) -> Any:
        """CuPy's object for a stream of this GPU, which must be the current one."""
        return self.cupy.cuda.Stream.from_external(Handle(stream))

    def current_stream(self) -> int:
        """CuPy's."""
        return int(self.cupy.cuda.get_current_stream(self.device).ptr)

    def record(self, stream: int) -> Any:
        """An event behind all work in a stream so far."""
        with self.here:
            event = self.cupy.cuda.Event(disable_timing=True)
            event.record(self._stream(stream))
            return event

    def wait_for(self, event: Any, stream: int) -> None:
        """Let a stream go on only after an event."""
        with self.here:
            self._stream(stream).wait_event(event)

    def is_capturing(self, stream: int) -> bool:
        """Is the stream being recorded into a CUDA graph?"""
        with self.here:
            return bool(self._stream(stream).is_capturing())
