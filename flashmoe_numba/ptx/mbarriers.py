"""Mbarriers: phases that end when all have arrived and all announced bytes are there (PTX ISA 9.7.13.15).

And `fence.proxy.async` (9.7.13.4), which also makes mbarriers known to the asynchronous proxy.
"""

from __future__ import annotations

from . import faults, state
from .compiled import njit
from .memory import CLOCK_BITS, IS_MBARRIER, READ0, READ1, WROTE
from .opcodes import SHARED
from .watch import (
    ASYNC_PROXY,
    GENERIC_PROXY,
    NOWHERE,
    cell_of,
    clear,
    copy_row,
    fault,
    happens_before,
    join,
    locate,
    plain,
    tick,
    watch_write,
)

MBARRIER_BYTES = 8


@njit
def find_mbarrier(S, thread, step, address):
    """Index of the block's mbarrier at a shared address, or NOWHERE and a fault."""
    block = S.threads[thread].block
    for which in range(state.MBARRIERS):
        mbarrier = S.mbarriers[block, which]
        if mbarrier.at == address:
            made = mbarrier.made_by << CLOCK_BITS | mbarrier.made_at
            if not happens_before(S, made, thread, GENERIC_PROXY):
                return fault(S, faults.RACE, thread, step, address)
            own = thread % S.s[state.BLOCK_THREADS]
            S.mbarrier_uses[block, which, own] = S.clocks[thread, GENERIC_PROXY, thread]
            return which
    return fault(S, faults.MBARRIER_STATE, thread, step, address)


@njit
def init_mbarrier(S, thread, step, address, count):
    block, which = S.threads[thread].block, -1
    for i in range(state.MBARRIERS):
        if S.mbarriers[block, i].at == address:
            fault(S, faults.MBARRIER_STATE, thread, step, address)
            return
        if S.mbarriers[block, i].at == 0:
            which = i
    at = locate(S, thread, step, address, SHARED, MBARRIER_BYTES)
    if which < 0 or at == NOWHERE:
        fault(S, faults.MBARRIER_STATE, thread, step, address)
        return
    if not watch_write(S, thread, step, at, MBARRIER_BYTES, plain(S, thread), GENERIC_PROXY):
        return
    mark(S, at, IS_MBARRIER, 0)
    mbarrier = S.mbarriers[block, which]  # `copies` counts on
    mbarrier.at, mbarrier.is_fenced = address, 0
    mbarrier.made_by, mbarrier.made_at = thread, S.clocks[thread, GENERIC_PROXY, thread]
    mbarrier.phase = mbarrier.bytes = mbarrier.in_flight = 0
    mbarrier.pending = mbarrier.expected = count
    clear(S.mbarrier_clocks[block, which])
    clear(S.mbarrier_uses[block, which])


@njit
def mark(S, at, word, read):
    for c in range(cell_of(S, at), cell_of(S, at + MBARRIER_BYTES - 1) + 1):
        S.cells[c, WROTE], S.cells[c, READ0], S.cells[c, READ1] = word, read, 0


@njit
def invalidate_mbarrier(S, thread, step, address):
    which = find_mbarrier(S, thread, step, address)
    if which == NOWHERE:
        return
    mbarrier = S.mbarriers[S.threads[thread].block, which]
    if mbarrier.in_flight or mbarrier.pending != mbarrier.expected:
        fault(S, faults.MBARRIER_STATE, thread, step, address)
        return
    if not follows_uses(S, thread, which):
        fault(S, faults.RACE, thread, step, address)
        return
    mbarrier.at = 0
    mark(S, S.blocks[S.threads[thread].block].shared_at + address, 0, plain(S, thread))  # who writes there comes after


@njit
def follows_uses(S, thread, which):
    """Does every use of an mbarrier by others of the block happen before what a thread does now?"""
    uses = S.mbarrier_uses[S.threads[thread].block, which]
    first = thread - thread % uses.size
    for i in range(uses.size):
        if first + i != thread and S.clocks[thread, GENERIC_PROXY, first + i] < uses[i]:
            return False
    return True


@njit
def fence_mbarriers(S, thread):
    """What this thread made, the asynchronous proxy may use."""
    for which in range(state.MBARRIERS):
        mbarrier = S.mbarriers[S.threads[thread].block, which]
        if mbarrier.at and mbarrier.made_by == thread:
            mbarrier.is_fenced = 1


@njit
def arrive_expecting(S, thread, step, address, num_bytes):
    which = find_mbarrier(S, thread, step, address)
    if which == NOWHERE:
        return
    block = S.threads[thread].block
    mbarrier = S.mbarriers[block, which]
    if mbarrier.pending == 0:
        fault(S, faults.MBARRIER_STATE, thread, step, address)
        return
    mbarrier.bytes += num_bytes
    mbarrier.pending -= 1
    if mbarrier.pending == 0 and mbarrier.bytes < mbarrier.in_flight:  # of copies that were asked for before
        fault(S, faults.MBARRIER_BYTES, thread, step, address)
        return
    join(S.mbarrier_clocks[block, which, 1], S.clocks[thread])
    tick(S, thread)
    end_phase(S, block, which)


@njit
def end_phase(S, block, which):
    """If all have arrived and all bytes are there: the next phase begins."""
    mbarrier = S.mbarriers[block, which]
    if mbarrier.pending == 0 and mbarrier.bytes == 0:
        mbarrier.phase ^= 1
        mbarrier.pending = mbarrier.expected
        copy_row(S.mbarrier_clocks[block, which, 0], S.mbarrier_clocks[block, which, 1])


@njit
def phase_has_ended(S, thread, step, address, parity):
    """Has the phase of this parity ended? Then what it counted happens before what the thread does now."""
    which = find_mbarrier(S, thread, step, address)
    if which == NOWHERE:
        return False
    block = S.threads[thread].block
    mbarrier = S.mbarriers[block, which]
    if mbarrier.phase == parity & 1:
        return False
    join(S.clocks[thread], S.mbarrier_clocks[block, which, 0])
    return True


@njit
def fence_async(S, thread):
    """What happens before now, in ordinary memory, happens before what the asynchronous proxy does for this thread."""
    clocks = S.clocks[thread]
    for actor in range(clocks.shape[1]):
        if clocks[GENERIC_PROXY, actor] > clocks[ASYNC_PROXY, actor]:
            clocks[ASYNC_PROXY, actor] = clocks[GENERIC_PROXY, actor]
    fence_mbarriers(S, thread)
    tick(S, thread)
