"""The device vocabulary and its meanings: interpreted (fibers.py), compiled for CPUs (cpu.py) and GPUs (cuda.py)."""

from .compilation import jit
from .vocabulary import (
    array_at,
    block_sync,
    cas,
    copy_row,
    fetch_add,
    lane,
    lanes,
    ld_acquire,
    ld_relaxed,
    load,
    local_array,
    now,
    pause,
    record_at,
    st_release,
    store,
)

__all__ = [
    "array_at",
    "block_sync",
    "cas",
    "copy_row",
    "fetch_add",
    "jit",
    "lane",
    "lanes",
    "ld_acquire",
    "ld_relaxed",
    "load",
    "local_array",
    "now",
    "pause",
    "record_at",
    "st_release",
    "store",
]
