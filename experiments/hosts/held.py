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
    """Resident memory moves by what lies beside free memory of the allocator; the others are exact."""

    blocks: int  # of Python's objects
    resident_kib: int
    descriptors: int
    threads: int
    shared_kib: int  # of the host

    def since(self, before: Held) -> Held:
        return Held(*(now - then for now, then in zip(self, before, strict=True)))


NOTHING = Held(0, 0, 0, 0, 0)
CHANCE_BLOCKS, CHANCE_KIB = 500, 8192  # free lists and fragments, however many calls


def held() -> Held:
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    memory = os.statvfs("/dev/shm")
    return Held(
        blocks=sys.getallocatedblocks(),
        resident_kib=resident_pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        shared_kib=(memory.f_blocks - memory.f_bfree) * memory.f_frsize // 1024,
    )


def most(grown: list[Held]) -> Held:
    """Of each thing the most that any process has grown by."""
    return Held(*map(max, zip(*grown, strict=True))) if grown else NOTHING


def complaints(grown: Held, num_calls: int) -> list[str]:
    """What has grown by more in so many calls than chance explains."""
    kept = dict(blocks=CHANCE_BLOCKS + num_calls // 10, resident_kib=CHANCE_KIB + num_calls)
    limits = Held(**kept, descriptors=0, threads=0, shared_kib=0)
    return [
        f"{name} grew by {getattr(grown, name)} in {num_calls} calls"
        for name in Held._fields
        if getattr(grown, name) > getattr(limits, name)
    ]
