"""Memory of the machine: one block of this process's, from which arrays come, and what is known of every granule of it.

Addresses are those of this process, so that the host's side finds what it wrote. Allocations have red zones between
them. Beside the bytes lie *cells*, one for each granule (2, 4 or 8 bytes, chosen for each allocation): who wrote it
last, who read it since, and from where in the program (watch.py).
"""

from __future__ import annotations

import threading
from collections import deque

import numpy as np

from reference.arrays import Array

from . import state

LINE = 256  # bytes; allocations begin at multiples of it
RED_ZONE = LINE
GRANULES = (2, 4, 8)
CELL_WORDS = 4  # last write, two reads, step of the write and, if it is atomic, the last one that is not
WROTE, READ0, READ1, WROTE_AT = range(CELL_WORDS)
# a cell's word: 0 is never, else when and by whom, and how
UNALLOCATED, IS_MBARRIER = -1, -2
CLOCK_BITS, ACTOR_BITS = 32, 14
STRONG = 1 << CLOCK_BITS + ACTOR_BITS
SCOPE_SHIFT = CLOCK_BITS + ACTOR_BITS + 1
STEP_SHIFT = CLOCK_BITS + ACTOR_BITS  # in WROTE_AT, above the actor and the clock of the last ordinary write
STEP_BITS = 17
HOST_ACTOR = (1 << ACTOR_BITS) - 1
HOST = HOST_ACTOR << CLOCK_BITS | 1  # before all that runs now


class Arena:
    """A block of memory, and what of it is allocated.

    Args:
        num_bytes: of all allocations and their red zones.
    """

    def __init__(self, num_bytes: int) -> None:
        num_bytes = -(-num_bytes // LINE) * LINE
        room = np.zeros(num_bytes + LINE, np.uint8)
        skip = -room.ctypes.data % LINE
        self.bytes = room[skip : skip + num_bytes]
        self.base = self.bytes.ctypes.data
        self.cells = np.zeros((num_bytes // GRANULES[0], CELL_WORDS), np.int64)
        self.lines = np.zeros(num_bytes // LINE, state.LINE)
        self._free = [(0, num_bytes)]  # (offset, bytes), in order
        self._given_back: deque[int] = deque()
        self._lock = threading.RLock()
        self.allocations: dict[int, tuple[int, str]] = {}  # bytes and name, by offset

    def allocate(self, num_bytes: int, granule: int, name: str, is_shared: bool = False) -> int:
        """The address of so many bytes, a multiple of LINE, which count as never written.

        Args:
            granule: bytes that are watched together; one of GRANULES.
            is_shared: it is a block's shared memory, and no global address leads there.

        Raises:
            MemoryError: there is no room.
        """
        if granule not in GRANULES:
            raise ValueError(f"granule must be one of {GRANULES}, got {granule}")
        with self._lock:
            self._take_back()
            return self._place(num_bytes, granule, name, is_shared)

    def _place(self, num_bytes: int, granule: int, name: str, is_shared: bool) -> int:
        """Where the first fit is."""
        whole = max(LINE, -(-num_bytes // LINE) * LINE)
        for index, (offset, room) in enumerate(self._free):
            if room >= whole + RED_ZONE:
                self._free[index] = (offset + whole + RED_ZONE, room - whole - RED_ZONE)
                self._mark(offset, num_bytes, whole, granule)
                self.lines["is_shared"][offset // LINE : (offset + whole) // LINE] = is_shared
                self.allocations[offset] = (num_bytes, name)
                return self.base + offset
        raise MemoryError(f"{num_bytes} bytes more are needed, and the machine has {self.bytes.size} in all")

    def _mark(self, offset: int, num_bytes: int, whole: int, granule: int) -> None:
        shift = granule.bit_length() - 1
        lines = slice(offset // LINE, (offset + whole) // LINE)
        first = offset // GRANULES[0]  # enough for the finest granule
        self.lines["shift"][lines] = shift
        self.lines["cell"][lines] = first + (np.arange(whole // LINE) * LINE >> shift)
        cells = self.cells[first : first + (whole >> shift)]
        cells[:] = 0
        cells[-(-num_bytes >> shift) :, WROTE] = UNALLOCATED

    def forbid(self, address: int, num_bytes: int) -> None:
        """Nobody may touch these bytes of an allocation."""
        if num_bytes > 0:
            self.cells[self._cells(address, num_bytes), WROTE] = UNALLOCATED

    def free(self, address: int) -> None:
        """Give an allocation back; who still uses it is found out. Finalizers call this, at any moment."""
        self._given_back.append(address - self.base)

    def _take_back(self) -> None:
        """Do what `free` was asked for, where nobody is in the middle of something."""
        while self._given_back:
            self._release(self._given_back.popleft())

    def _release(self, offset: int) -> None:
        num_bytes, _ = self.allocations.pop(offset)
        whole = max(LINE, -(-num_bytes // LINE) * LINE)
        self.lines["shift"][offset // LINE : (offset + whole) // LINE] = 0
        self._free = _joined(sorted([*self._free, (offset, whole + RED_ZONE)]))

    def view(self, address: int, num_bytes: int) -> Array:
        """The bytes themselves, uint8.

        Raises:
            ValueError: they are not inside one allocation.
        """
        offset = address - self.base
        owner = self.owner(address)
        if owner is None or offset + num_bytes > owner + self.allocations[owner][0]:
            raise ValueError(f"address must be inside an allocation, got {num_bytes} bytes at {address:#x}")
        return self.bytes[offset : offset + num_bytes]

    def owner(self, address: int) -> int | None:
        """Offset of the allocation that an address is in."""
        offset = address - self.base
        with self._lock:
            self._take_back()
            found = list(self.allocations.items())
        before = [at for at, (num_bytes, _) in found if at <= offset < at + max(num_bytes, 1)]
        return before[0] if before else None

    def wrote(self, address: int, num_bytes: int) -> None:
        """The host has written these bytes: before all that is launched later."""
        if num_bytes > 0:
            self.cells[self._cells(address, num_bytes)] = (HOST, 0, 0, 0)

    def _cells(self, address: int, num_bytes: int) -> slice:
        first, last = address - self.base, address - self.base + num_bytes - 1
        return slice(self._cell(first), self._cell(last) + 1)

    def _cell(self, offset: int) -> int:
        line = self.lines[offset // LINE]
        return int(line["cell"]) + (offset % LINE >> int(line["shift"]))

    def forget_order(self) -> None:
        """All that has been written counts as written by the host: a launch has ended."""
        for offset, (num_bytes, _) in list(self.allocations.items()):
            cells = self.cells[self._cells(self.base + offset, max(num_bytes, 1))]
            written = cells[:, WROTE]
            written[written > 0] = HOST
            cells[:, READ0:] = 0

    def close(self) -> None:
        """Let the memory go, whoever still knows the arena. Arrays that somebody has keep their bytes."""
        with self._lock:
            self.bytes, self.cells, self.lines = self.bytes[:0].copy(), self.cells[:0].copy(), self.lines[:0].copy()
            self._free, self._given_back = [], deque(maxlen=0)  # what finalizers give back later goes nowhere
            self.allocations.clear()

    def describe(self, address: int) -> str:
        """Where an address lies, in words."""
        owner = self.owner(address)
        if owner is None:
            return f"{address:#x}, which is in no allocation"
        num_bytes, name = self.allocations[owner]
        return f"byte {address - self.base - owner} of {num_bytes} of {name}"


def _joined(free: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours as one."""
    joined: list[tuple[int, int]] = []
    for offset, room in free:
        if joined and sum(joined[-1]) == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + room)
        else:
            joined.append((offset, room))
    return joined
