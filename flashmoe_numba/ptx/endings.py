"""What must be over when a thread ends: whatever works for it asynchronously.

Products are over when they were waited for (PTX ISA 9.7.15.4, 9.7.15.7.3), and copies when some thread has learnt so
from their mbarrier (9.7.9.25, completion mechanisms). The operands and the places of both are memory of the block,
which is no longer its own when its last thread has ended (5.1.7).
"""

from __future__ import annotations

from . import faults, state
from .compiled import njit
from .copies import copy_actor
from .watch import GENERIC_PROXY, fault


@njit
def end_thread(S, thread, step):
    S.threads[thread].doing = state.ENDED
    warps = S.s[state.BLOCK_THREADS] // state.WARP
    warp = thread // state.WARP
    if warps > 0 and S.warps[warp].waited < S.warps[warp].issued:
        fault(S, faults.UNFINISHED, thread, step, 0)
        return
    block = S.threads[thread].block
    if all_have_ended(S, block):
        for which in range(state.MBARRIERS):
            if not is_copy_over(S, block, which):
                fault(S, faults.UNFINISHED, thread, step, 0)


@njit
def all_have_ended(S, block):
    first = block * S.s[state.BLOCK_THREADS]
    for thread in range(first, first + S.s[state.BLOCK_THREADS]):  # noqa: SIM110  no generator in the machine
        if S.threads[thread].doing != state.ENDED:
            return False
    return True


@njit
def is_copy_over(S, block, which):
    """Does a thread of the block know that the last copy which an mbarrier counts is there?"""
    last, actor = S.mbarriers[block, which].copies, copy_actor(S, block, which)
    if last == 0:
        return True
    first = block * S.s[state.BLOCK_THREADS]
    for thread in range(first, first + S.s[state.BLOCK_THREADS]):
        if S.clocks[thread, GENERIC_PROXY, actor] >= last:
            return True
    return False
