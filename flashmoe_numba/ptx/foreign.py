"""Memory outside of the arena, which other processes write too: segments of ranks that have processes of their own.

Nobody here knows who wrote there last, so nothing is watched: values are read and written in place, words with real
atomics of this CPU. The other process does its part in real time, so that is what the timer shows then.

Of the order that comes through another process only the outermost is kept: who acquires anything there comes behind all
that anybody here has released there before. So no race is reported that is none; some that are one are missed.
"""

from __future__ import annotations

from numba import types

from ..device import cpu  # noqa: F401  what the verbs mean here
from ..device import vocabulary as verbs
from . import state
from .compiled import njit
from .opcodes import ATOMIC_ADD, ATOMIC_CAS, LOAD_WORD, NO_ACQUIRE

RELEASED_ROW = 0  # of the clocks that words are released with: that of all foreign words together
SLEEP_US = 20  # about what a core needs to change hands
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


@njit
def exists(S):
    return S.foreign.shape[0] > 0


@njit
def range_of(S, address, num_bytes):
    """Index of the range that holds these bytes, or -1."""
    for i in range(S.foreign.shape[0]):
        first, length = S.foreign[i, 0], S.foreign[i, 1]
        if first <= address and address + num_bytes <= first + length:
            return i
    return -1


@njit
def is_outside(S, at):
    """Is this offset, which was located, one of foreign memory?"""
    return at < 0 or at >= S.m.size


@njit
def memory_of(S, address):
    """(address, bytes) of what an address lies in: a foreign range, else the arena."""
    i = range_of(S, address, 1)
    if i < 0:
        return S.s[state.BASE], S.m.size
    return S.foreign[i, 0], S.foreign[i, 1]


@njit
def access(S, code, at, value, other, order):
    """One atomic access to 64 bits; returns what a load or an atomic operation returns."""
    i = at >> 3
    if code == LOAD_WORD:
        return verbs.ld_relaxed(S.m64, i) if order & NO_ACQUIRE else verbs.ld_acquire(S.m64, i)
    if code == ATOMIC_ADD:
        return verbs.fetch_add(S.m64, i, value)
    if code == ATOMIC_CAS:
        return verbs.cas(S.m64, i, value, other)
    verbs.st_release(S.m64, i, value)
    return value


@njit
def now_ns():
    return verbs.now()


@njit
def sleep(duration_ns):
    """Give the core to the other process, for a little."""
    _usleep(types.uint32(min(SLEEP_US, max(1, duration_ns // 1000))))
