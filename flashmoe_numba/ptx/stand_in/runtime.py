"""CuPy's `cuda.runtime` and `cuda.driver`, as far as the host's side calls them, under their names."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...build.build import BLOCKS_PER_MULTIPROCESSOR
from ...build.variants import architecture_of
from . import errors
from .errors import CUDARuntimeError, Status
from .queues import Queues
from .space import Space

BUS_IDS = ("0000:0A:00.0", "0000:0B:00.0")
H2D, D2H, D2D = 1, 2, 3  # cudaMemcpyKind
SHARED_BYTES = {  # by architecture: (of a multiprocessor, most of a block); CUDA C++ programming guide, appendix
    "sm_80": (164 << 10, 163 << 10),
    "sm_90a": (228 << 10, 227 << 10),
    "sm_100a": (228 << 10, 227 << 10),
}
RESERVED_SHARED_BYTES = 1 << 10  # of each block, by the system
THREADS_PER_MULTIPROCESSOR = 2048


class Driver:
    """`cuda.driver`: how many blocks a multiprocessor holds."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self._shared_bytes, _ = SHARED_BYTES[architecture_of(capability)]

    def occupancyMaxActiveBlocksPerMultiprocessor(self, function: int, threads: int, shared: int) -> int:
        """As far as the launch bound, threads and shared memory allow; registers fit the bound by construction."""
        by_shared = self._shared_bytes // (shared + RESERVED_SHARED_BYTES)
        return min(BLOCKS_PER_MULTIPROCESSOR, THREADS_PER_MULTIPROCESSOR // threads, by_shared)


class Runtime:
    """`cuda.runtime`.

    Args:
        peers: can the devices read and write each other's memory?
    """

    CUDARuntimeError = errors.CUDARuntimeError

    def __init__(
        self, space: Space, queues: Queues, capability: tuple[int, int], multiprocessors: int, peers: bool
    ) -> None:
        self._space, self._queues, self._capability = space, queues, capability
        self._multiprocessors, self._peers = multiprocessors, peers

    # devices

    def getDeviceCount(self) -> int:
        return self._queues.num_devices

    def getDevice(self) -> int:
        return self._queues.device

    def getDeviceProperties(self, device: int) -> dict[str, Any]:
        self._queues.check_device(device)
        major, minor = self._capability
        _, of_block = SHARED_BYTES[architecture_of(self._capability)]
        return {
            "name": b"stand-in for a GPU",
            "major": major,
            "minor": minor,
            "multiProcessorCount": self._multiprocessors,
            "sharedMemPerBlockOptin": of_block,
        }

    def deviceGetPCIBusId(self, device: int) -> str:
        self._queues.check_device(device)
        return BUS_IDS[device]

    def deviceGetByPCIBusId(self, bus_id: str) -> int:
        seen = BUS_IDS[: self._queues.num_devices]
        if bus_id not in seen:
            why = f"bus_id must be one of {', '.join(seen)}, got {bus_id}"
            raise CUDARuntimeError(Status.cudaErrorInvalidDevice, why)
        return seen.index(bus_id)

    def deviceCanAccessPeer(self, device: int, peer: int) -> int:
        """No, for one and the same."""
        return int(self._peers and device != peer)

    def deviceSynchronize(self) -> None:
        self._queues.wait_for_device()

    # memory

    def memGetInfo(self) -> tuple[int, int]:
        return self._space.free_bytes(self._queues.device), self._space.memory_bytes

    def malloc(self, num_bytes: int) -> int:
        self._queues.check_unsafe("malloc")
        return self._space.make_segment(num_bytes, self._queues.device)

    def free(self, address: int) -> None:
        self._queues.check_unsafe("free")
        self._space.drop_segment(address, own=True)

    def ipcGetMemHandle(self, address: int) -> bytes:
        return self._space.handle(address)

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        return self._space.open_segment(handle, self._queues.device)

    def ipcCloseMemHandle(self, address: int) -> None:
        self._space.drop_segment(address, own=False)

    # copies

    def memcpyAsync(self, target: int, source: int, num_bytes: int, kind: int, stream: int) -> None:
        self.memcpy2DAsync(target, num_bytes, source, num_bytes, num_bytes, 1, kind, stream)

    def memcpy2DAsync(
        self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, kind: int,
        stream: int,
    ) -> None:  # fmt: skip
        """Copy `height` rows of `width` bytes, whose beginnings are a pitch apart."""
        if kind not in (H2D, D2H, D2D):
            raise CUDARuntimeError(Status.cudaErrorInvalidValue, f"kind must be one of 1, 2 and 3, got {kind}")
        if width > min(target_pitch, source_pitch):
            why = f"width must be at most both pitches, {target_pitch} and {source_pitch}, got {width}"
            raise CUDARuntimeError(Status.cudaErrorInvalidPitchValue, why)
        places = [(target + i * target_pitch, source + i * source_pitch) for i in range(height)]
        for place in places:  # mistakes are told by the call, and for what is let go later by the replay
            self._ends(*place, width, kind)

        def copy() -> None:
            for place in places:
                self._copy(*place, width, kind)

        self._queues.enqueue(stream, copy)

    def _ends(self, target: int, source: int, num_bytes: int, kind: int) -> tuple[Any, Any]:
        """The bytes of both ends.

        Raises:
            CUDARuntimeError: they are not where this kind of copy has them.
        """
        host, device = self._space.pinned_at, self._space.bytes_at
        return (host if kind == D2H else device)(target, num_bytes), (host if kind == H2D else device)(
            source, num_bytes
        )

    def _copy(self, target: int, source: int, num_bytes: int, kind: int) -> None:
        to, values = self._ends(target, source, num_bytes, kind)
        np.copyto(to, values)
        if kind != D2H:
            self._space.wrote(target, num_bytes)
