"""What goes to the place of CuPy: its names, on memory of this process and with launches that go to a callable."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from reference.scalars import check_whole

from ...gpu import libcuda
from . import arrays, errors, streams
from .driver import DriverLibrary
from .modules import Grids, Launch, Modules, text_beside
from .queues import Queues
from .runtime import BUS_IDS, Driver, Runtime
from .space import Arena, PinnedMemory, Space

MEMORY_BYTES = 1 << 30
_whose = threading.RLock()


class StandIn:
    """One or two GPUs that are none, under CuPy's names.

    Args:
        arena: memory for arrays.
        launch: runs a grid (modules.py); what it raises breaks the GPU, as a failed kernel does.
        capability: of each GPU.
        multiprocessors: of each GPU.
        texts: the linked PTX of a cubin, by its path; default: what lies beside it.
        num_devices: 1 or 2.
        memory_bytes: of each GPU.
        segment_granule: bytes of arrays of bytes that are watched together (memory.py).
        peers: can the GPUs read and write each other's memory?

    Raises:
        ValueError: naming the rule.
    """

    def __init__(
        self,
        arena: Arena,
        launch: Launch,
        *,
        capability: tuple[int, int] = (9, 0),
        multiprocessors: int = 2,
        texts: Callable[[str], str] = text_beside,
        num_devices: int = 2,
        memory_bytes: int = MEMORY_BYTES,
        segment_granule: int = 2,
        peers: bool = True,
    ) -> None:
        check_whole("num_devices", num_devices, 1, len(BUS_IDS))
        check_whole("multiprocessors", multiprocessors, 1)
        self.queues, self.space = Queues(num_devices), Space(arena, memory_bytes, segment_granule)
        self.library = DriverLibrary(self.queues, capability)
        runtime = Runtime(self.space, self.queues, capability, multiprocessors, peers)
        self._set_arrays()
        self.cuda = self._cuda(runtime, Driver(capability))
        self.RawModule = Modules(self._grids(launch, runtime), texts).load

    __name__, __spec__ = "cupy", None  # what the import system asks of a module

    def _set_arrays(self) -> None:
        self.ndarray = _bound(arrays.ndarray, space=self.space, queues=self.queues)
        makers = arrays.Makers(self.ndarray)
        self.empty, self.zeros, self.stack = makers.empty, makers.zeros, makers.stack
        self.asarray, self.asnumpy = makers.asarray, makers.asnumpy
        self.ascontiguousarray, self.from_dlpack = makers.ascontiguousarray, makers.from_dlpack

    def _cuda(self, runtime: Runtime, driver: Driver) -> SimpleNamespace:
        """The module cupy.cuda."""
        kinds = {kind.__name__: _bound(kind, queues=self.queues) for kind in (streams.Device, streams.Stream)}
        return SimpleNamespace(
            **kinds,
            Event=streams.Event,
            Graph=streams.Graph,
            PinnedMemoryPool=lambda: SimpleNamespace(malloc=self._pin),
            UnownedMemory=arrays.UnownedMemory,
            MemoryPointer=arrays.MemoryPointer,
            memory=SimpleNamespace(OutOfMemoryError=errors.OutOfMemoryError),
            get_current_stream=self._current_stream,
            runtime=runtime,
            driver=driver,
        )

    def _grids(self, launch: Launch, runtime: Runtime) -> Grids:
        properties = runtime.getDeviceProperties(0)

        def resident(threads: int, shared: int) -> int:
            count = self.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(0, threads, shared)
            return int(count * properties["multiProcessorCount"])

        return Grids(launch, self.queues, resident, properties["sharedMemPerBlockOptin"])

    def _pin(self, num_bytes: int) -> PinnedMemory:
        self.queues.check_unsafe("taking page-locked memory")
        return self.space.pin(num_bytes)

    def _current_stream(self, device: int | None = None) -> Any:
        return self.cuda.Stream.of(self.queues.stream_of(self.queues.device if device is None else device))

    @property
    def foreign(self) -> list[tuple[int, int]]:
        """(address, bytes) of all memory outside of the arena that kernels may touch."""
        return self.space.foreign

    def close(self) -> None:
        """Nothing works from now on; segments that are shared with other processes are dropped."""
        self.queues.broken = self.queues.broken or "this GPU has ended"
        self.space.close()


def _bound(kind: type[Any], **attributes: Any) -> Any:
    """The class for one stand-in."""
    return type(kind.__name__, (kind,), attributes)


@contextlib.contextmanager
def installed(stand_in: StandIn) -> Iterator[StandIn]:
    """While this lasts `import cupy` gives the stand-in, and NVIDIA's driver is its own. It is not closed after.

    It holds for all threads of this process, of which one may have stand-ins, one in another.

    Raises:
        RuntimeError: another thread has one.
    """
    if not _whose.acquire(blocking=False):
        raise RuntimeError("a stand-in for CuPy holds for the whole process, and another thread has one")
    modules: dict[str, Any] = sys.modules
    before = {"cupy": modules["cupy"]} if "cupy" in modules else {}
    load = libcuda.load
    modules["cupy"], libcuda.load = stand_in, lambda: stand_in.library
    try:
        yield stand_in
    finally:
        libcuda.load = load
        modules.pop("cupy", None)
        modules.update(before)
        _whose.release()
