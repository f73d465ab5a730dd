"""Every access is looked at: where it goes, whether somebody wrote there, and what happens before it.

A thread's clock counts what it released; an access carries the clock at which it was made. It *happens before* what a
thread does now if the thread's vector of clocks has reached it (PTX ISA 8.9.5, causality order). What the asynchronous
proxy does is measured by a vector of its own, which only a proxy fence brings up to date (8.6, proxies). Two accesses
that are both strong need no order if the scopes of both hold the other's thread (8.5, scope; 8.7.1, races).
"""

from __future__ import annotations

from . import faults, foreign, state
from .compiled import njit
from .memory import (
    ACTOR_BITS,
    CLOCK_BITS,
    HOST_ACTOR,
    IS_MBARRIER,
    LINE,
    READ0,
    READ1,
    SCOPE_SHIFT,
    STEP_SHIFT,
    STRONG,
    WROTE,
    WROTE_AT,
)
from .opcodes import GENERIC, GLOBAL, SHARED
from .program import SHARED_BEGIN, SHARED_WINDOW

GENERIC_PROXY, ASYNC_PROXY = 0, 1
CLOCK_MASK, ACTOR_MASK = (1 << CLOCK_BITS) - 1, (1 << ACTOR_BITS) - 1
NOWHERE = -1
A_READ, ORDINARY_WRITE = -1, -2  # other steps of a race, where the step itself is not remembered


@njit
def fault(S, code, thread, step, address, cell=0):
    """Note the first thing that is wrong; the launch ends. Returns NOWHERE."""
    if S.s[state.FAULT] == faults.NONE:
        S.s[state.FAULT], S.s[state.FAULT_THREAD], S.s[state.FAULT_STEP] = code, thread, step
        S.s[state.FAULT_ADDRESS], S.s[state.FAULT_CELL] = address, cell
    return NOWHERE


@njit
def locate(S, thread, step, address, space, num_bytes):
    """Offset of an access from the arena's begin, or NOWHERE; of foreign memory it lies outside of the arena."""
    if address & (num_bytes - 1):
        return fault(S, faults.MISALIGNED, thread, step, address)
    at = address
    if space == SHARED or (space == GENERIC and address >= SHARED_WINDOW):
        at = address - SHARED_WINDOW if space == GENERIC else address & 0xFFFFFFFF
        if at < SHARED_BEGIN or at + num_bytes > S.s[state.SHARED_BYTES]:
            return fault(S, faults.OUT_OF_BOUNDS, thread, step, address)
        return S.blocks[S.threads[thread].block].shared_at + at
    if space == GLOBAL and address >= SHARED_WINDOW:
        return fault(S, faults.WRONG_SPACE, thread, step, address)
    at -= S.s[state.BASE]
    if not is_global(S, at, num_bytes) and foreign.range_of(S, address, num_bytes) < 0:
        return fault(S, faults.OUT_OF_BOUNDS, thread, step, address)
    return at


@njit
def is_global(S, at, num_bytes):
    """Is an offset in the arena in an allocation of global memory?"""
    if at < 0 or at + num_bytes > S.m.size:
        return False
    first, last = S.lines[at // LINE], S.lines[(at + num_bytes - 1) // LINE]
    return first.shift > 0 and first.is_shared == 0 and last.shift > 0


@njit
def cell_of(S, at):
    line = at // LINE
    return S.lines[line].cell + ((at & (LINE - 1)) >> S.lines[line].shift)


@njit
def happens_before(S, word, thread, proxy):
    """Does the access of a cell's word come before what a thread does now, in a proxy?"""
    actor = word >> CLOCK_BITS & ACTOR_MASK
    if actor == HOST_ACTOR or (actor == thread and proxy == GENERIC_PROXY):
        return True
    return S.clocks[thread, proxy, actor] >= word & CLOCK_MASK


@njit
def has_reached(clocks, word):
    """`happens_before` for the vector of one proxy by itself."""
    actor = word >> CLOCK_BITS & ACTOR_MASK
    return actor == HOST_ACTOR or clocks[actor] >= word & CLOCK_MASK


@njit
def same_place(S, scope, one, other):
    """Does a scope of thread `one` hold the thread `other`?"""
    if scope == 2:
        return True
    a, b = S.threads[one].block, S.threads[other].block
    return a == b if scope == 0 else S.blocks[a].gpu == S.blocks[b].gpu


@njit
def may_meet(S, word, mine, thread):
    """Two strong accesses whose scopes hold each other's threads."""
    if not (word & STRONG and mine & STRONG):
        return False
    other = word >> CLOCK_BITS & ACTOR_MASK
    if other == HOST_ACTOR:
        return True
    return same_place(S, word >> SCOPE_SHIFT & 3, other, thread) and same_place(
        S, mine >> SCOPE_SHIFT & 3, thread, other
    )


@njit
def plain_write(S, c):
    """The word of the last ordinary write to a cell; one that is before everything if there is none."""
    word = S.cells[c, WROTE]
    if word & STRONG:
        return S.cells[c, WROTE_AT] & (1 << STEP_SHIFT) - 1
    return max(word, 0)


@njit
def follows_write(S, thread, step, at, c, mine, proxy):
    """May an access of a thread follow what was written to a cell? If not, a race is noted.

    An atomic write that it may meet does not hide an ordinary one from before.
    """
    word = S.cells[c, WROTE]
    if word <= 0 or happens_before(S, word, thread, proxy):
        return True
    if not may_meet(S, word, mine, thread):
        race(S, thread, step, at, word, mine, S.cells[c, WROTE_AT] >> STEP_SHIFT)
        return False
    word = plain_write(S, c)
    if not happens_before(S, word, thread, proxy):
        race(S, thread, step, at, word, mine, ORDINARY_WRITE)
        return False
    return True


@njit
def race(S, thread, step, at, word, mine, other_step):
    S.s[state.FAULT_OTHER_STEP] = other_step
    code = faults.SCOPE if word & STRONG and mine & STRONG else faults.RACE
    return fault(S, code, thread, step, at + S.s[state.BASE], word)


@njit
def watch_read(S, thread, step, at, num_bytes, mine):
    """May these bytes be read now by an ordinary or atomic access, and note that they were. False if not."""
    if foreign.is_outside(S, at):
        return True
    first, last = cell_of(S, at), cell_of(S, at + num_bytes - 1)
    for c in range(first, last + 1):
        word = S.cells[c, WROTE]
        if word <= 0:
            fault(S, unwritten(word), thread, step, at + S.s[state.BASE])
            return False
        if not follows_write(S, thread, step, at, c, mine, GENERIC_PROXY):
            return False
        note_read(S, c, thread, mine, GENERIC_PROXY)
    return True


@njit
def unwritten(word):
    """What a read of a cell that holds no access is."""
    if word == 0:
        return faults.UNINITIALISED
    return faults.MBARRIER_TOUCHED if word == IS_MBARRIER else faults.OUT_OF_BOUNDS


@njit
def note_read(S, c, thread, mine, proxy):
    """Of two reads that are remembered, replace one that no longer matters; of three that all do, one is forgotten."""
    if no_longer_matters(S, S.cells[c, READ0], mine, thread, proxy):
        S.cells[c, READ0] = mine
    else:
        S.cells[c, READ1] = mine


@njit
def no_longer_matters(S, word, mine, thread, proxy):
    """Does whatever races with an access race with a thread's new one, too? Less races with an atomic one."""
    if mine & STRONG and not word & STRONG:
        return word == 0
    is_same = (word ^ mine) >> CLOCK_BITS & ACTOR_MASK == 0
    return is_same or happens_before(S, word, thread, proxy)


@njit
def watch_write(S, thread, step, at, num_bytes, mine, proxy):
    """May these bytes be written now, and note that they were. False if not."""
    if foreign.is_outside(S, at):
        return True
    first, last = cell_of(S, at), cell_of(S, at + num_bytes - 1)
    for c in range(first, last + 1):
        word = S.cells[c, WROTE]
        if word < 0:
            fault(S, unwritten(word), thread, step, at + S.s[state.BASE])
            return False
        if not follows_write(S, thread, step, at, c, mine, proxy):
            return False
        for which in (READ0, READ1):
            word = S.cells[c, which]
            if word > 0 and not happens_before(S, word, thread, proxy) and not may_meet(S, word, mine, thread):
                race(S, thread, step, at, word, mine, A_READ)
                return False
        note_write(S, c, step, mine)
    return True


@njit
def note_write(S, c, step, mine):
    """An atomic write hides the atomic accesses before it, an ordinary one hides all."""
    if not mine & STRONG:
        S.cells[c, WROTE], S.cells[c, WROTE_AT] = mine, step << STEP_SHIFT
        S.cells[c, READ0] = S.cells[c, READ1] = 0
        return
    S.cells[c, WROTE_AT] = step << STEP_SHIFT | plain_write(S, c)
    S.cells[c, WROTE] = mine
    for which in (READ0, READ1):
        if S.cells[c, which] & STRONG:
            S.cells[c, which] = 0


@njit
def plain(S, thread):
    """The word of an ordinary access that a thread makes now."""
    return thread << CLOCK_BITS | S.clocks[thread, GENERIC_PROXY, thread]


@njit
def strong(S, thread, scope):
    return plain(S, thread) | STRONG | scope << SCOPE_SHIFT


@njit
def tick(S, thread):
    """What a thread does from now on comes after what it has just released."""
    S.clocks[thread, GENERIC_PROXY, thread] += 1


@njit
def join(into, clocks):
    """Both proxies' vectors: what happened before `clocks` happens before `into` now."""
    for proxy in range(2):
        for actor in range(into.shape[1]):
            if clocks[proxy, actor] > into[proxy, actor]:
                into[proxy, actor] = clocks[proxy, actor]


@njit
def copy_row(into, row):
    """All of an array into another one of the same shape; an assignment would want memory for a copy."""
    flat, values = into.reshape(-1), row.reshape(-1)
    for i in range(flat.size):
        flat[i] = values[i]


@njit
def clear(clocks):
    flat = clocks.reshape(-1)
    for i in range(flat.size):
        flat[i] = 0
