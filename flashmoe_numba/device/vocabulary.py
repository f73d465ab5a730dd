"""The device vocabulary: every verb that kernel code may use, besides arithmetic and array indexing.

A verb is a Python function. Its body is the *interpreted* meaning (fibers.py); compiled meanings are overloads that the
target's module registers (cpu.py, cuda.py), and the explorer puts a watched one in its place (explore/run/watched.py).
Kernel code imports the verbs by name, beside tile_gemm and constants, so one source serves all.

Arrays are C-contiguous and one-dimensional, indexed in elements. 16-bit floats are stored as integers, because no
compiled CPU target has them: `uint16` holds float16 bits and `int16` holds bfloat16 bits; `load` and `store` convert.

Memory model: plain accesses are ordered only by `block_sync` inside a block, and by a release that an acquire has read
between blocks and ranks. `fetch_add` and `cas` are both acquire and release. All atomics have system scope, and work on
int64 words.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import fibers
from .records import read_record

LOCAL_ELEMENTS = 16
GPU_LANES = 128  # threads of a block on a GPU: a warpgroup
IS_VERB = True  # places in the source are those of callers (fibers.py)


def lane() -> int:
    """Index of this thread in its block, in [0, lanes())."""
    return fibers.current().lane


def lanes() -> int:
    """Threads in this block."""
    return fibers.current().lanes


def block_sync() -> None:
    """Barrier of the block's threads; orders their plain accesses."""
    fibers.block_barrier()


def ld_acquire(words: Any, i: int) -> Any:
    """Load word `i`; what its releaser wrote before is visible after."""
    fibers.preempt()
    return words[i]


def ld_relaxed(words: Any, i: int) -> Any:
    """Load word `i` atomically, ordering nothing else: the cheap poll."""
    fibers.preempt()
    return words[i]


def st_release(words: Any, i: int, value: int) -> None:
    """Store word `i` after everything this block did before (with `block_sync` in between) is visible."""
    fibers.preempt()
    words[i] = value
    fibers.note_progress()
    fibers.preempt()


def fetch_add(words: Any, i: int, value: int) -> Any:
    """Add to word `i`; returns what it held."""
    fibers.preempt()
    old = words[i]
    words[i] = old + value
    fibers.note_progress()
    fibers.preempt()
    return old


def cas(words: Any, i: int, expected: int, value: int) -> Any:
    """Replace word `i` by `value` if it holds `expected`; returns what it held."""
    fibers.preempt()
    old = words[i]
    if old == expected:
        words[i] = value
        fibers.note_progress()
    fibers.preempt()
    return old


def send_put(wire: Any, put: Any) -> bool:
    """Do a `Put` (kernel/wire.py), where this device reaches other hosts itself.

    One lane calls it. What it, and its block before a barrier, stored is what is put; memory may be written again when
    the peer has answered.

    Args:
        wire: the ring of puts, or what such a device has in its place (heap/nvshmem.py).

    Returns:
        Was it done? Else somebody must carry it: the ring is for that.
    """
    return False


def acquire_told(wire: Any, words: Any, i: int) -> Any:
    """`ld_acquire` of a flag that a put has set: rows that came by the network are visible, too."""
    return ld_acquire(words, i)


def push_control(wire: Any, remote: Any, every_ns: int) -> None:
    """Show ranks of other hosts this rank's control words, unless that was less than `every_ns` ago; nothing, where
    whoever carries puts does that.

    Args:
        remote: `[num_ranks]`, which ranks those are.
    """


def pause(attempt: int) -> int:
    """Give way while polling. `attempt` counts the polls since the last success; returns it plus one."""
    fibers.idle()
    return attempt + 1


def has_settled(attempt: int) -> bool:
    """Have so many polls found nothing that what comes together would be here by now? Interpreted, any may be last."""
    return True


def now() -> int:
    """Nanoseconds of a monotonic clock that all ranks of a machine share; on fibers, switches so far."""
    return fibers.clock()


def array_at(address: int, num_elements: int, like: Any) -> Any:
    """View of raw memory, such as a peer's segment, with the element type of `like`."""
    return fibers.memory_view(address, num_elements, like.dtype)


def record_at(words: Any, at: int, like: Any) -> Any:
    """The named tuple that lies in `words` from word `at` on (records.py), of the type of `like`."""
    return read_record(words, at, like, fibers.memory_view)


def load(array: Any, i: int) -> Any:
    """Element `i` as float32, or float64 for a float64 array."""
    value = array[i]
    if array.dtype == np.uint16:
        return np.float32(np.uint16(value).view(np.float16))
    if array.dtype == np.int16:
        return np.uint32(int(value) << 16 & 0xFFFFFFFF).view(np.float32)
    return value


def store(array: Any, i: int, value: Any) -> None:
    """Round `value` to the element type (to nearest, ties to even) and store it."""
    if array.dtype == np.uint16:
        with np.errstate(over="ignore"):
            array[i] = np.float16(value).view(np.uint16)
    elif array.dtype == np.int16:
        array[i] = fibers.bfloat16_bits(value)
    else:
        array[i] = value


def copy_row(target: Any, target_at: int, source: Any, source_at: int, num_elements: int) -> None:
    """Copy a row with all lanes of the block."""
    fiber = fibers.current()
    fibers.preempt()
    for c in range(fiber.lane, num_elements, fiber.lanes):
        target[target_at + c] = source[source_at + c]


def local_array(like: Any) -> Any:
    """LOCAL_ELEMENTS zeros of the element type of `like`, of this lane only; in registers where that can be."""
    return np.zeros(LOCAL_ELEMENTS, like.dtype)


def part_columns(target: Any, source: Any, num_columns: int) -> int:
    """How many columns of a row a lane should sum at a time, where both arrays are rows of `num_columns`."""
    return -(-num_columns // lanes())


def zero_sums(working: Any, num_sums: int) -> Any:
    """`num_sums` zeros of the element type of `working`, of this lane only.

    They lie in `working`, in registers or elsewhere: one lane of a block may use `working`, or none.

    Args:
        num_sums: as `part_columns` has it, or fewer at the end of a row.
    """
    return np.zeros(num_sums, working.dtype)


def add_part(sums: Any, num_sums: int, source: Any, source_at: int, weight: Any) -> None:
    """Add `weight` times a part of a row to sums."""
    for c in range(num_sums):
        sums[c] = sums[c] + weight * load(source, source_at + c)


def scale_part(sums: Any, num_sums: int, scale: Any, scale_at: int) -> None:
    """Multiply sums by a part of a row of their type."""
    for c in range(num_sums):
        sums[c] = sums[c] * load(scale, scale_at + c)


def store_part(target: Any, target_at: int, sums: Any, num_sums: int) -> None:
    """Round sums to the element type, and store them as a part of a row."""
    for c in range(num_sums):
        store(target, target_at + c, sums[c])
