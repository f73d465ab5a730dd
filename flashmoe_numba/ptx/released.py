"""What a value of a word was released with: clocks, and within which scope (PTX ISA 8.8, 8.9.2, 8.9.4).

Who acquires a value comes behind all releases that lead to it through atomic operations, if the scopes of each release
and of the acquire hold the other thread; how wide the operations in between are does not matter. So clocks are kept for
each scope by itself, with the last thread that released them within it; scopes that no release has take no memory.

A thread's own relaxed store behind its release hands this on (8.8, release patterns, 2), unless another thread stored
to the word in between: then less is acquired than the ISA says.
"""

from __future__ import annotations

from .compiled import njit
from .watch import copy_row, join, same_place

SCOPES = 3
NOBODY = 0


@njit
def acquire(S, thread, scope, row, version):
    """What a version of a word was released with happens before what a thread does now."""
    for within in range(SCOPES):
        by = S.released_by[within, row, version] - 1
        if by >= 0 and same_place(S, within, by, thread) and same_place(S, scope, thread, by):
            join(S.clocks[thread], S.released[within, row, version])


@njit
def release(S, thread, scope, row, version):
    """A version of a word is released by a thread, behind what it is released with by others."""
    by, clocks = S.released_by[scope, row, version] - 1, S.released[scope, row, version]
    if by >= 0 and same_place(S, scope, by, thread):
        join(clocks, S.clocks[thread])
    else:
        copy_row(clocks, S.clocks[thread])
    S.released_by[scope, row, version] = thread + 1


@njit
def hand_on(S, row, version):
    """The other version's releases lead to this one, too."""
    for within in range(SCOPES):
        S.released_by[within, row, version] = S.released_by[within, row, 1 - version]
        if S.released_by[within, row, version] != NOBODY:
            copy_row(S.released[within, row, version], S.released[within, row, 1 - version])


@njit
def hand_own_on(S, thread, row, version):
    """Of the other version's releases those of this thread lead to this one."""
    for within in range(SCOPES):
        S.released_by[within, row, version] = NOBODY
        if S.released_by[within, row, 1 - version] == thread + 1:
            S.released_by[within, row, version] = thread + 1
            copy_row(S.released[within, row, version], S.released[within, row, 1 - version])
