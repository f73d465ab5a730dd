"""Puts: what a rank does for peers whose memory it cannot store into, because they are on other hosts.

Rows for such a peer are laid out in this rank's own *stage*, which has the shape of the regions that they are for, and
whose first index is the peer. From there a *put* brings them. With NVSHMEM a GPU does it itself. Else it goes into a
ring of puts, out of which whoever carries puts between hosts takes them in order. Word 0 of the ring counts places that
were given out. A place holds its number plus one as a stamp, which is released after the fields of the put. The ring
has room for all puts of a call, and all have been taken when the call ends, so nobody waits for a place.

A put's rows land before its signal. Those of a put without one land before the signal of the next that has one, of the
same block to the same peer. No more is relied on: signals may come in any order.
"""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_numba.device import fetch_add, jit, send_put, st_release

# words of a place
PUT_WORDS = 8
STAMP, PEER, SOURCE_AT, TARGET_AT, NUM_BYTES, FLAG_AT, WORD = range(7)
FIRST = 16  # words before the first place

NO_FLAG = -1  # rows alone: a later put to the same peer has the signal


class Put(NamedTuple):
    """What a carrier is to do. Offsets are bytes in a segment; words behind STAMP, in this order."""

    peer: int
    source_at: int  # in this rank's segment
    target_at: int  # in the peer's
    num_bytes: int  # 0: a signal alone
    flag_at: int  # of the word that is released when the rows are there; the abort word is claimed; or NO_FLAG
    word: int


@jit
def is_remote(segments, peer):
    """Is a peer on another host?"""
    return segments.remote[peer] != 0


@jit
def first_row(p, segments, peer, expert):
    """Where rows for a peer begin in a room of its: of the expert there that gets them, or of the one here that made
    them. The first index of a room in the peer's memory is the rank that writes; of one in the stage, the peer.
    """
    first = peer if is_remote(segments, peer) else p.rank_idx
    return (first * p.experts_per_rank + expert) * p.slots


class PutRows(NamedTuple):
    """Rows of a peer's room that follow each other, and so do where they belong in its memory."""

    peer: int
    expert: int  # as `first_row` has it
    slot: int  # of the first row
    num_rows: int


@jit
def put_rows(p, segments, rows, region_at, row_bytes, flag_at, word):
    """Put rows from the stage to where they belong in a peer's memory, then a signal if there is one.

    Args:
        region_at, row_bytes: where the rows' region begins in a segment, and what each of its rows takes.
    """
    here = first_row(p, segments, rows.peer, rows.expert) + rows.slot
    there = (p.rank_idx * p.experts_per_rank + rows.expert) * p.slots + rows.slot
    source_at, target_at = p.stage_at + region_at + here * row_bytes, region_at + there * row_bytes
    post(segments.wire, Put(rows.peer, source_at, target_at, rows.num_rows * row_bytes, flag_at, word))


@jit
def put_signal(segments, peer, flag_at, word):
    post(segments.wire, Put(peer, 0, 0, 0, flag_at, word))


@jit
def post(wire, put):
    """Do a put, or hand it to whoever carries puts. One lane calls it, after a barrier behind what the put reads."""
    if not send_put(wire, put):
        queue_put(wire, put)


@jit
def queue_put(wire, put):
    """Let it be carried: into the ring."""
    number = fetch_add(wire, 0, 1)
    at = place_at(wire, number)
    for i in range(len(put)):
        wire[at + PEER + i] = put[i]
    st_release(wire, at + STAMP, number + 1)


@jit
def place_at(wire, number):
    """The first word of the place that has the put of this number."""
    return FIRST + number % ((wire.size - FIRST) // PUT_WORDS) * PUT_WORDS
