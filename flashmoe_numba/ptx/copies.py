"""Copies of boxes from global to shared memory, TMA (PTX ISA 9.7.9.25), which end later than they begin.

A copy is asked for and done when it is due. Rows of a box that are not there to be read, because nobody wrote them or
somebody may be writing them, are legal as long as nobody uses them: they arrive as NaN. What a copy may read is what
happened before it was asked for; a source that is written until it lands is undefined (9.7.9.25), so it is the writers
at its landing that are looked at.
"""

from __future__ import annotations

import numpy as np

from ..device import vocabulary as verbs
from . import faults, foreign, state, tensor_map, tensors
from .compiled import njit
from .mbarriers import end_phase, find_mbarrier
from .memory import CLOCK_BITS, UNALLOCATED, WROTE
from .opcodes import GLOBAL
from .order import draw, now_ns
from .program import SHARED_BEGIN
from .watch import (
    ASYNC_PROXY,
    GENERIC_PROXY,
    NOWHERE,
    cell_of,
    copy_row,
    fault,
    happens_before,
    has_reached,
    is_global,
    locate,
    tick,
    watch_write,
)

MAP_ALIGNMENT, COPY_NS = 64, 1000
NOT_A_NUMBER = 0xFF  # bytes of a NaN in every format


@njit
def copy_actor(S, block, which):
    """The actor that writes for copies which an mbarrier of a block counts."""
    warps = S.s[state.BLOCK_THREADS] // state.WARP
    return S.threads.size + block * (warps + state.MBARRIERS) + warps + which


# tensor maps


@njit
def fence_map(S, thread, step, address):
    """A tensor map in global memory is acquired, by this thread for its block."""
    maps = S.fenced_maps[S.threads[thread].block]
    for i in range(maps.size):
        if maps[i].address in (0, address):
            maps[i].address, maps[i].thread, maps[i].clock = address, thread, S.clocks[thread, GENERIC_PROXY, thread]
            tick(S, thread)
            return
    fault(S, faults.TOO_MANY, thread, step, address)


@njit
def is_map_fenced(S, thread, address):
    maps = S.fenced_maps[S.threads[thread].block]
    for i in range(maps.size):
        if maps[i].address == address:
            word = maps[i].thread << CLOCK_BITS | maps[i].clock
            return happens_before(S, word, thread, GENERIC_PROXY)
    return False


# boxes


@njit
def ask_for_box(S, thread, step, to, map_address, places, barrier):
    """Check a copy and put it under way."""
    map_at = locate(S, thread, step, map_address, GLOBAL, MAP_ALIGNMENT)
    if map_at == NOWHERE:
        return
    if foreign.is_outside(S, map_at):
        fault(S, faults.NO_MAP, thread, step, map_address)
        return
    words = S.m64[map_at >> 3 : (map_at >> 3) + tensor_map.NUM_WORDS]
    if tensors.map_fault(words):
        fault(S, faults.NO_MAP, thread, step, map_address)
        return
    if not is_map_fenced(S, thread, map_address):
        fault(S, faults.MAP_UNFENCED, thread, step, map_address)
        return
    which = find_mbarrier(S, thread, step, barrier)
    if which == NOWHERE:
        return
    block = S.threads[thread].block
    mbarrier = S.mbarriers[block, which]
    num_bytes = tensors.box_bytes(words)
    if not mbarrier.is_fenced:
        fault(S, faults.MBARRIER_UNFENCED, thread, step, barrier)
        return
    if mbarrier.pending == 0 and mbarrier.bytes - mbarrier.in_flight < num_bytes:  # else more may be announced
        fault(S, faults.MBARRIER_BYTES, thread, step, barrier)
        return
    if to < SHARED_BEGIN or to % tensors.BOX_ALIGNMENT or to + num_bytes > S.s[state.SHARED_BYTES]:
        fault(S, faults.COPY_PLACE, thread, step, to)
        return
    mbarrier.in_flight += num_bytes
    clock = begin_writing(S, thread, step, block, which, S.blocks[block].shared_at + to, num_bytes)
    if clock > 0:
        put_under_way(S, thread, step, words, map_at, places, to, which)


@njit
def begin_writing(S, thread, step, block, which, at, num_bytes):
    """Claim shared memory for a copy; returns its clock, or 0."""
    actor = copy_actor(S, block, which)
    S.mbarriers[block, which].copies += 1
    clock = S.mbarriers[block, which].copies
    S.mbarrier_clocks[block, which, 1, GENERIC_PROXY, actor] = clock
    S.mbarrier_clocks[block, which, 1, ASYNC_PROXY, actor] = clock
    if not watch_write(S, thread, step, at, num_bytes, actor << CLOCK_BITS | clock, ASYNC_PROXY):
        return 0
    return clock


@njit
def put_under_way(S, thread, step, words, map_at, places, to, which):
    n = S.s[state.NUM_COPIES]
    if n == S.copies.shape[0]:
        fault(S, faults.TOO_MANY, thread, step, to)
        return
    copy = S.copies[n]
    copy.due = now_ns(S) + draw(S) % COPY_NS if S.s[state.LATE] > 0 else 0
    copy.copy_block, copy.copy_map, copy.copy_to = S.threads[thread].block, map_at, to
    copy.place0, copy.place1, copy.place2 = places
    copy.copy_barrier = which
    copy_row(S.copy_clocks[n], S.clocks[thread, ASYNC_PROXY])
    for row in range(tensors.box_rows(words)):
        address, num_bytes = tensors.box_source(words, places[0], places[1], places[2], row)
        if num_bytes > 0 and not is_inside(S, address, num_bytes):
            fault(S, faults.OUT_OF_BOUNDS, thread, step, address)
            return
    S.s[state.NUM_COPIES] = n + 1


@njit
def is_inside(S, address, num_bytes):
    """Is a row of a box wholly in allocated memory? A map that is too wide or too tall leads out of it."""
    if foreign.range_of(S, address, num_bytes) >= 0:
        return True
    at = address - S.s[state.BASE]
    return is_global(S, at, num_bytes) and S.cells[cell_of(S, at + num_bytes - 1), WROTE] != UNALLOCATED


@njit
def may_be_copied(S, clocks, address, num_bytes):
    """Has all of it been written, and does that happen before what the asynchronous proxy did at these clocks?"""
    if foreign.range_of(S, address, num_bytes) >= 0:
        return True
    at = address - S.s[state.BASE]
    for c in range(cell_of(S, at), cell_of(S, at + num_bytes - 1) + 1):
        word = S.cells[c, WROTE]
        if word <= 0 or not has_reached(clocks, word):
            return False
    return True


@njit
def finish_due_copies(S):
    n, time = S.s[state.NUM_COPIES], now_ns(S)
    for i in range(n - 1, -1, -1):
        if S.copies[i].due <= time:
            finish_copy(S, S.copies[i], S.copy_clocks[i])
            S.s[state.NUM_COPIES] -= 1
            S.copies[i] = S.copies[S.s[state.NUM_COPIES]]
            copy_row(S.copy_clocks[i], S.copy_clocks[S.s[state.NUM_COPIES]])


@njit
def finish_copy(S, copy, clocks):
    """The bytes arrive, and the mbarrier counts them."""
    block, which, to = copy.copy_block, copy.copy_barrier, copy.copy_to
    words = S.m64[copy.copy_map >> 3 : (copy.copy_map >> 3) + tensor_map.NUM_WORDS]
    first = S.blocks[block].shared_at
    shared = S.m[first : first + S.s[state.SHARED_BYTES]]
    places = copy.place0, copy.place1, copy.place2
    base, length = foreign.memory_of(S, words[tensor_map.ADDRESS])
    memory = verbs.array_at(np.uint64(base), length, S.m)
    code = tensors.copy_box(words, places[0], places[1], places[2], shared, to, memory, base)
    if code:
        fault(S, faults.COPY_PLACE, block * S.s[state.BLOCK_THREADS], 0, to)
        return
    poison_rows(S, words, places, shared, to, clocks)
    num_bytes = tensors.box_bytes(words)
    S.mbarriers[block, which].bytes -= num_bytes
    S.mbarriers[block, which].in_flight -= num_bytes
    end_phase(S, block, which)


@njit
def poison_rows(S, words, places, shared, to, clocks):
    """Rows of a box in shared memory that were not there to be read become NaN."""
    length = tensors.row_bytes(words)
    for row in range(tensors.box_rows(words)):
        address, num_bytes = tensors.box_source(words, places[0], places[1], places[2], row)
        if num_bytes > 0 and not may_be_copied(S, clocks, address, num_bytes):
            S.s[state.POISONED_ROWS] += 1
            for i in range(length):
                shared[to + row * length + i] = NOT_A_NUMBER
