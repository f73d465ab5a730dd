"""What orders threads: barriers, and words that are released and acquired (PTX ISA 8.8, release and acquire patterns).

A word's new value may be hidden from others for a while after the store, unless the store happens before their load:
each of them reads the old value until then, with what that was released with.
"""

from __future__ import annotations

from . import faults, foreign, state
from .compiled import njit
from .opcodes import ATOMIC_ADD, ATOMIC_CAS, NO_ACQUIRE, NO_RELEASE, STORE_WORD
from .released import acquire, hand_on, hand_own_on, release
from .typed import i64, put
from .watch import (
    CLOCK_MASK,
    GENERIC_PROXY,
    NOWHERE,
    copy_row,
    fault,
    join,
    locate,
    strong,
    tick,
    watch_read,
    watch_write,
)

WORD_BYTES = 8


@njit
def draw(S):
    """The next random number, 63 bits (xorshift)."""
    x = S.s[state.RANDOM]
    x ^= x << 13
    x ^= (x >> 7) & 0x01FFFFFFFFFFFFFF
    x ^= x << 17
    S.s[state.RANDOM] = x
    return x & 0x7FFFFFFFFFFFFFFF


@njit
def now_ns(S):
    """Time: 128 steps of any threads take a nanosecond, as if so many ran at once; real if others share memory."""
    if foreign.exists(S):
        return foreign.now_ns()
    return (S.s[state.STEPS] >> 7) + S.s[state.SKIPPED_NS]


# words


@njit
def word_at(S, thread, step, address):
    """Index of a sync word, which is made on its first use; NOWHERE if there are too many."""
    i = (address >> 3) * 0x9E3779B1 % state.WORD_TABLE
    while S.words[i].key != address:
        if S.words[i].key == 0:
            if S.s[state.NUM_WORDS] == S.released.shape[1]:
                return fault(S, faults.TOO_MANY, thread, step, address)
            S.words[i].key, S.words[i].row = address, S.s[state.NUM_WORDS]
            S.s[state.NUM_WORDS] += 1
            return i
        i = (i + 1) % state.WORD_TABLE
    return i


@njit
def access_word(S, thread, step, code, address, value, other, order):
    """One atomic access to 64 bits; returns what a load or an atomic operation returns. A fault is noted.

    `order` is a scope, with NO_ACQUIRE and NO_RELEASE.
    """
    at = locate(S, thread, step, address, 0, WORD_BYTES)
    if at == NOWHERE:
        return 0
    if foreign.is_outside(S, at):
        return access_foreign(S, thread, code, at, value, other, order)
    mine = strong(S, thread, order & 3)
    i = word_at(S, thread, step, at + S.s[state.BASE])  # of shared memory, too: each block has its own
    if i == NOWHERE or (code != STORE_WORD and not watch_read(S, thread, step, at, WORD_BYTES, mine)):
        return 0
    if code in (ATOMIC_ADD, ATOMIC_CAS):
        return modify(S, thread, step, code, at, i, value, other, mine, order)
    if code == STORE_WORD:
        store_word(S, thread, step, at, i, value, mine, order)
        return 0
    return load_word(S, thread, at, i, order)


@njit
def access_foreign(S, thread, code, at, value, other, order):
    """As access_word, on a word that other processes write, too: all of these are released and acquired as one."""
    released = S.released[0, foreign.RELEASED_ROW, 0]
    if not order & NO_RELEASE:
        join(released, S.clocks[thread])
        tick(S, thread)
    result = foreign.access(S, code, at, value, other, order)
    if not order & NO_ACQUIRE:
        join(S.clocks[thread], released)
    return result


@njit
def load_word(S, thread, at, i, order):
    word = S.words[i]
    version = word.version
    result = i64(S.m, at)
    if is_hidden(S, thread, word):
        result, version = word.old_value, 1 - version
    if not order & NO_ACQUIRE:
        acquire(S, thread, order & 3, word.row, version)
    return result


@njit
def is_hidden(S, thread, word):
    """Does a thread still see the old value?"""
    if word.hidden_until == 0:
        return False
    if now_ns(S) >= word.hidden_until:
        word.hidden_until = 0
        return False
    writer = word.writer
    return writer != thread and S.clocks[thread, GENERIC_PROXY, writer] < word.writer_clock


@njit
def store_word(S, thread, step, at, i, value, mine, order):
    if not watch_write(S, thread, step, at, WORD_BYTES, mine, GENERIC_PROXY):
        return
    replace(S, thread, at, i, value, mine)
    row, version = S.words[i].row, S.words[i].version
    hand_own_on(S, thread, row, version)
    if not order & NO_RELEASE:
        release(S, thread, order & 3, row, version)
    tick(S, thread)


@njit
def replace(S, thread, at, i, value, mine):
    """A word's next value and version, which others may see late."""
    word = S.words[i]
    word.old_value, word.version, word.hidden_until = i64(S.m, at), 1 - word.version, 0
    if S.s[state.LATE] > 0 and draw(S) & 1:
        word.hidden_until = now_ns(S) + 1 + draw(S) % S.s[state.LATE]
        word.writer, word.writer_clock = thread, mine & CLOCK_MASK
    put(S.m, at, value)


@njit
def modify(S, thread, step, code, at, i, value, other, mine, order):
    """An atomic operation, which sees the last value.

    One that does not release still hands on what the value before was released with (8.9.2, observation order).
    """
    word = S.words[i]
    word.hidden_until = 0  # who looks from now on sees no less than this one has seen
    before, row = i64(S.m, at), word.row
    if not order & NO_ACQUIRE:
        acquire(S, thread, order & 3, row, word.version)
    if code == ATOMIC_CAS and before != value:
        return before
    if not watch_write(S, thread, step, at, WORD_BYTES, mine, GENERIC_PROXY):
        return 0
    replace(S, thread, at, i, before + value if code == ATOMIC_ADD else other, mine)
    hand_on(S, row, word.version)
    if not order & NO_RELEASE:
        release(S, thread, order & 3, row, word.version)
    tick(S, thread)
    return before


# barriers of threads (9.7.13.1)


@njit
def arrive(S, thread, step, barrier, count):
    """A thread comes to a barrier; the last one lets all go on."""
    block = S.threads[thread].block
    if count == 0:
        count = S.s[state.BLOCK_THREADS]
    if count % state.WARP or count > S.s[state.BLOCK_THREADS]:
        fault(S, faults.BARRIER_COUNT, thread, step, count)
        return
    S.threads[thread].doing, S.threads[thread].wake = state.AT_BARRIER, barrier
    S.arrived[block, barrier] += 1
    if S.arrived[block, barrier] == count:
        S.arrived[block, barrier] = 0
        let_go(S, block, barrier)


@njit
def let_go(S, block, barrier):
    """What all did before the barrier happens before what any does behind it."""
    first = block * S.s[state.BLOCK_THREADS]
    last = first + S.s[state.BLOCK_THREADS]
    meeting = -1
    for thread in range(first, last):
        if S.threads[thread].doing == state.AT_BARRIER and S.threads[thread].wake == barrier:
            if meeting < 0:
                meeting = thread
            else:
                join(S.clocks[meeting], S.clocks[thread])
    for thread in range(first, last):
        if S.threads[thread].doing == state.AT_BARRIER and S.threads[thread].wake == barrier:
            if thread != meeting:
                copy_row(S.clocks[thread], S.clocks[meeting])
            warp_meets(S, thread)
    for thread in range(first, last):
        if S.threads[thread].doing == state.AT_BARRIER and S.threads[thread].wake == barrier:
            S.threads[thread].doing = state.READY
            tick(S, thread)


@njit
def warp_meets(S, thread):
    """`.aligned`: the threads of a warp must be at the same barrier instruction."""
    lead = thread - thread % state.WARP
    if S.threads[lead].doing != state.AT_BARRIER or S.threads[lead].pc != S.threads[thread].pc:
        fault(S, faults.BARRIER_DIVERGED, thread, S.threads[thread].pc - 1, S.threads[lead].pc - 1)
