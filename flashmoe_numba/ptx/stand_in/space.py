"""The memory of the devices: arrays in the arena, and segments that processes share; and page-locked memory.

A segment is a file in shared memory without a name, whose handle says where in /proc its maker has it open: so nothing
is left behind, however a process ends. The memory of the host that copies read and write must be page-locked, which
finds what is not, and what a graph reads after it was let go.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from reference.arrays import Array

from ...processes import shared_memory
from .errors import CUDARuntimeError, OutOfMemoryError, Status

HANDLE_BYTES = 64  # of a cudaIpcMemHandle_t
SMALLEST_GRANULE, LARGEST_GRANULE = 2, 8  # bytes


class Arena(Protocol):
    """Memory whose bytes are watched; what the machine has (memory.py)."""

    def allocate(self, num_bytes: int, granule: int, name: str) -> int: ...

    def free(self, address: int) -> None: ...

    def view(self, address: int, num_bytes: int) -> Array: ...

    def wrote(self, address: int, num_bytes: int) -> None: ...


class Allocation:
    """Bytes in the arena, given back when nobody holds this any more."""

    def __init__(self, space: Space, address: int, num_bytes: int, device: int) -> None:
        self.address, self.num_bytes, self.device = address, num_bytes, device
        weakref.finalize(self, space.give_back, address).atexit = False


class Segment:
    """A file in shared memory, mapped: one that this process made, or that of another one."""

    def __init__(self, descriptor: int, num_bytes: int, device: int) -> None:
        self.bytes: Array = np.frombuffer(mmap.mmap(descriptor, num_bytes), np.uint8)
        self.address, self.num_bytes, self.device = self.bytes.ctypes.data, num_bytes, device
        self.descriptor: int | None = None  # of what is ours: open as long as others may map it


class PinnedMemory(bytearray):
    """Page-locked memory of the host."""


class Space:
    """All memory that copies and kernels may touch.

    Args:
        memory_bytes: of each device.
        segment_granule: of arrays of bytes in the arena, in bytes: they hold elements of several sizes.
    """

    def __init__(self, arena: Arena, memory_bytes: int, segment_granule: int) -> None:
        self.arena, self.memory_bytes, self._segment_granule = arena, memory_bytes, segment_granule
        self._taken: dict[int, tuple[int, int]] = {}  # address: (bytes, device), in the arena
        self._segments: dict[int, Segment] = {}
        self._pinned: dict[int, int] = {}  # address: bytes

    # arrays

    def take(self, num_bytes: int, itemsize: int, device: int) -> Allocation:
        """Bytes for an array, not initialised.

        Raises:
            OutOfMemoryError: the device or the arena has no more.
        """
        granule = self._segment_granule if itemsize == 1 else min(max(itemsize, SMALLEST_GRANULE), LARGEST_GRANULE)
        if num_bytes > self.free_bytes(device):
            raise OutOfMemoryError(f"device {device} has {self.free_bytes(device)} bytes left, and needs {num_bytes}")
        try:
            address = self.arena.allocate(num_bytes, granule, f"array of {num_bytes} bytes on device {device}")
        except MemoryError as error:
            raise OutOfMemoryError(str(error)) from None
        self._taken[address] = num_bytes, device
        return Allocation(self, address, num_bytes, device)

    def give_back(self, address: int) -> None:
        del self._taken[address]
        self.arena.free(address)

    def free_bytes(self, device: int) -> int:
        arrays = list(self._taken.values())  # some may be given back meanwhile
        taken = sum(num_bytes for num_bytes, owner in arrays if owner == device)
        own = (s.num_bytes for s in self._segments.values() if s.device == device and s.descriptor is not None)
        return self.memory_bytes - taken - sum(own)

    # any of it

    def bytes_at(self, address: int, num_bytes: int) -> Array:
        """The bytes themselves.

        Raises:
            CUDARuntimeError: they are not all of one allocation.
        """
        for segment in list(self._segments.values()):
            if segment.address <= address and address + num_bytes <= segment.address + segment.num_bytes:
                return segment.bytes[address - segment.address :][:num_bytes]
        try:
            return self.arena.view(address, num_bytes)
        except ValueError as error:
            raise CUDARuntimeError(Status.cudaErrorInvalidValue, str(error)) from None

    def wrote(self, address: int, num_bytes: int) -> None:
        """The host has written to the devices' memory."""
        if num_bytes > 0 and not self._is_shared(address):
            self.arena.wrote(address, num_bytes)

    def _is_shared(self, address: int) -> bool:
        return any(s.address <= address < s.address + s.num_bytes for s in list(self._segments.values()))

    def device_of(self, address: int) -> int:
        for start, (num_bytes, device) in [*self._taken.items(), *self._shared()]:
            if start <= address < start + num_bytes:
                return device
        raise CUDARuntimeError(Status.cudaErrorInvalidValue, f"{address:#x} is no memory of a device")

    def _shared(self) -> Iterator[tuple[int, tuple[int, int]]]:
        yield from ((s.address, (s.num_bytes, s.device)) for s in list(self._segments.values()))

    # page-locked memory

    def pin(self, num_bytes: int) -> PinnedMemory:
        memory = PinnedMemory(max(1, num_bytes))
        address = np.frombuffer(memory, np.uint8).ctypes.data
        self._pinned[address] = len(memory)
        weakref.finalize(memory, self._pinned.pop, address).atexit = False
        return memory

    def pinned_at(self, address: int, num_bytes: int) -> Array:
        """Page-locked bytes of the host.

        Raises:
            CUDARuntimeError: they are not, or not any more.
        """
        for start, length in list(self._pinned.items()):
            if start <= address and address + num_bytes <= start + length:
                return _host_bytes(address, num_bytes)
        why = f"{num_bytes} bytes at {address:#x} must be page-locked memory of the host, and still be held by somebody"
        raise CUDARuntimeError(Status.cudaErrorInvalidValue, why)

    # segments

    @property
    def foreign(self) -> list[tuple[int, int]]:
        """(address, bytes) of all memory outside of the arena that kernels may touch."""
        return [(segment.address, segment.num_bytes) for segment in self._segments.values()]

    def make_segment(self, num_bytes: int, device: int) -> int:
        """Zeroed memory of a device that other processes can map; its address.

        Raises:
            CUDARuntimeError: there is not enough.
        """
        if num_bytes > self.free_bytes(device):
            why = f"device {device} has {self.free_bytes(device)} bytes left, and needs {num_bytes}"
            raise CUDARuntimeError(Status.cudaErrorMemoryAllocation, why)
        folder = shared_memory.FOLDER if shared_memory.FOLDER.is_dir() else Path(tempfile.gettempdir())
        with tempfile.TemporaryFile(dir=folder) as file:
            shortage = shared_memory.claim(file.fileno(), num_bytes, "a segment needs", "use a smaller layer", folder)
            if shortage is not None:
                raise CUDARuntimeError(Status.cudaErrorMemoryAllocation, str(shortage))
            segment = self._map(file.fileno(), num_bytes, device)
            segment.descriptor = os.dup(file.fileno())
        return segment.address

    def _map(self, descriptor: int, num_bytes: int, device: int) -> Segment:
        segment = Segment(descriptor, num_bytes, device)
        self._segments[segment.address] = segment
        return segment

    def handle(self, address: int) -> bytes:
        """By which another process maps a segment of this one."""
        segment = self._segments.get(address)
        if segment is None or segment.descriptor is None:
            raise CUDARuntimeError(Status.cudaErrorInvalidValue, f"{address:#x} is no segment that this process made")
        return f"/proc/{os.getpid()}/fd/{segment.descriptor}".encode().ljust(HANDLE_BYTES, b"\0")

    def open_segment(self, handle: bytes, device: int) -> int:
        """Map another process's segment; its address here."""
        path = handle.rstrip(b"\0").decode()
        if path.startswith(f"/proc/{os.getpid()}/"):
            why = "a process cannot open a handle of its own"
            raise CUDARuntimeError(Status.cudaErrorDeviceUninitialized, why)
        try:
            with open(path, "r+b") as file:
                return self._map(file.fileno(), os.fstat(file.fileno()).st_size, device).address
        except OSError as error:
            raise CUDARuntimeError(Status.cudaErrorInvalidValue, f"no segment has handle {path!r} ({error})") from None

    def drop_segment(self, address: int, own: bool) -> None:
        """Free one's own segment, or unmap another process's. The memory goes when no array is left that shows it."""
        segment = self._segments.get(address)
        if segment is None or (segment.descriptor is not None) != own:
            kind = "made" if own else "opened"
            raise CUDARuntimeError(Status.cudaErrorInvalidValue, f"{address:#x} is no segment that this process {kind}")
        del self._segments[address]
        if segment.descriptor is not None:
            os.close(segment.descriptor)

    def close(self) -> None:
        """Drop all segments."""
        for segment in list(self._segments.values()):
            self.drop_segment(segment.address, segment.descriptor is not None)


def _host_bytes(address: int, num_bytes: int) -> Array:
    buffer: Any = (ctypes.c_char * num_bytes).from_address(address)
    return np.frombuffer(buffer, np.uint8)
