"""What a process holds, and its host's shared memory, for who asks whether it grows."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from pathlib import Path
from typing import NamedTuple


class Held(NamedTuple):
    """Of one process, but for `shared_kib`.

    Args:
        blocks: of Python's objects.
        allocated_kib: what the C allocator has given out.
        free_kib: what it keeps for later. Each thread that lives at the same time has a store of its own, so this grows
            until all have once held as many messages as come early.
        resident_kib: without `free_kib`.
        shared_kib: of the host.
    """

    blocks: int
    allocated_kib: int
    free_kib: int
    resident_kib: int
    descriptors: int
    threads: int
    shared_kib: int

    def since(self, before: Held) -> Held:
        return Held(*(now - then for now, then in zip(self, before, strict=True)))


NOTHING = Held(*[0] * len(Held._fields))
CHANCE_BLOCKS, CHANCE_KIB = 500, 2048  # free lists, and pages that are free in part


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, in bytes: of all its stores."""

    _fields_ = [(f"other{i}", ctypes.c_size_t) for i in range(4)] + [
        (name, ctypes.c_size_t) for name in ("hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def held() -> Held:
    gc.collect()
    libc, malloc = ctypes.CDLL(None), _Mallinfo()
    with contextlib.suppress(AttributeError):  # glibc's
        libc.malloc_trim(0)
        libc.mallinfo2.restype = _Mallinfo
        malloc = libc.mallinfo2()
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = os.statvfs("/dev/shm")
    return Held(
        blocks=sys.getallocatedblocks(),
        allocated_kib=(malloc.uordblks + malloc.hblkhd) // 1024,
        free_kib=malloc.fordblks // 1024,
        resident_kib=(resident_pages * os.sysconf("SC_PAGE_SIZE") - malloc.fordblks) // 1024,
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        shared_kib=(memory.f_blocks - memory.f_bfree) * memory.f_frsize // 1024,
    )


def most(grown: list[Held]) -> Held:
    """Of each thing the most that any process has grown by."""
    return Held(*map(max, zip(*grown, strict=True))) if grown else NOTHING


def complaints(grown: Held, early_kib: int) -> list[str]:
    """What has grown by more than chance explains, however many calls there were.

    Args:
        early_kib: messages of so many bytes may be here before they are asked for.
    """
    memory = dict(allocated_kib=CHANCE_KIB, free_kib=CHANCE_KIB + early_kib, resident_kib=CHANCE_KIB)
    limits = Held(blocks=CHANCE_BLOCKS, **memory, descriptors=0, threads=0, shared_kib=0)
    return [
        f"{name} grew by {amount}, more than {limit}"
        for name, amount, limit in zip(Held._fields, grown, limits, strict=True)
        if amount > limit
    ]
