"""What the machine is made of while it runs: arrays, most of them of records.

Threads of all blocks are numbered through, as are warps. Besides them there are *actors* of the asynchronous proxy: for
each block one for the products of each warp, and one for the copies that each of its mbarriers counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

WARP = 32
MBARRIERS = 8  # that a block may have at once
NAMED_BARRIERS = 16
WARPGROUP = 128
MAPS = 32  # that a block may have acquired: those of four products with rows of each height
COPIES_PER_BLOCK = 512  # under way at once: three stages of 128 rows that come one by one, and their weights
MOST_PRODUCTS, MOST_GROUPS, MOST_SUMS = 64, 16, 128
WORD_TABLE = 1 << 16  # of words that threads synchronize by, found by a hash of their address

READY, SLEEPING, AT_BARRIER, AT_WARP, ENDED = range(5)  # what a thread is doing

(
    STEPS, SKIPPED_NS, LIMIT, RANDOM, MODE, CURRENT,
    FAULT, FAULT_THREAD, FAULT_STEP, FAULT_ADDRESS, FAULT_CELL, FAULT_OTHER_STEP,
    NUM_COPIES, NUM_WORDS, BASE, SHARED_BYTES, BLOCK_THREADS, SLOTS, LATE, POISONED_ROWS, NUM_SCALARS,
) = range(21)  # fmt: skip


def _record(*names: str) -> np.dtype[Any]:
    return np.dtype([(name, np.int64) for name in names])


THREAD = _record("pc", "doing", "wake", "block")  # wake: ns, or of a thread at a barrier which
BLOCK = _record("gpu", "shared_at", "done")  # shared_at: in the arena; done: products made
WARP_STATE = _record("issued", "groups", "waited", "is_dirty")  # products, groups of them, products waited for
LINE = _record("cell", "shift", "is_shared")  # of the arena (memory.py)
WORD = _record("key", "row", "old_value", "hidden_until", "writer", "writer_clock", "version")
MBARRIER = _record(
    "at",
    "phase",
    "pending",
    "expected",
    "bytes",
    "made_by",
    "made_at",
    "is_fenced",
    "in_flight",
    "copies",
)
FENCED_MAP = _record("address", "thread", "clock")
COPY = _record("due", "copy_block", "copy_map", "place0", "place1", "place2", "copy_to", "copy_barrier")
PRODUCT = _record("sums", "left", "right", "form")


class State(NamedTuple):
    """All of a launch."""

    code: Any  # int32 [steps * ROW] (program.py)
    extra: Any  # int32
    executed: Any  # int64 [steps]: how often
    s: Any  # int64 [NUM_SCALARS]
    r: Any  # registers of all threads, int64 [threads * SLOTS]
    threads: Any
    blocks: Any
    warps: Any
    arrived: Any  # int64 [blocks, NAMED_BARRIERS]
    m: Any  # uint8, the arena
    m64: Any  # the same as int64
    foreign: Any  # int64 [ranges, 2]: (address, bytes) of memory outside of the arena
    lines: Any
    cells: Any  # int64 [cells, 4]: memory.py
    clocks: Any  # int32 [threads, 2, actors]: what has happened before, for a thread and for the asynchronous proxy
    words: Any  # [WORD_TABLE]
    released: Any  # int32 [scopes, words, 2, 2, actors]: clocks that a word's last two values were released with
    released_by: Any  # int32 [scopes, words, 2]: 1 + by which thread, 0 if by none
    mbarriers: Any  # [blocks, MBARRIERS]
    mbarrier_clocks: Any  # int32 [blocks, MBARRIERS, 2, 2, actors]: of the last phase and of this one
    mbarrier_uses: Any  # int32 [blocks, MBARRIERS, threads of a block]: clock of each thread's last use
    fenced_maps: Any  # [blocks, MAPS]
    copies: Any  # [blocks * COPIES_PER_BLOCK]: under way
    copy_clocks: Any  # int32 [blocks * COPIES_PER_BLOCK, actors]: what the asynchronous proxy may see for each
    products: Any  # [blocks, MOST_PRODUCTS]: by number modulo their most
    group_ends: Any  # int64 [warps, MOST_GROUPS]: products issued when a group was committed
    scratch: Any  # float32 [threads of a block, MOST_SUMS]
    room: Any  # float64 [tensors.ROOM]
