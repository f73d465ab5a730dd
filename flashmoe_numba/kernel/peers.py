"""What a rank does to its peers: the one module of the kernel that knows how another rank's memory is reached.

Rows for a peer are written into its *room* for them, and then *told*: whoever acquires the signal word sees what this
block stored before. A room is in the peer's memory where that is addressable; else it is in this rank's stage, and
telling is a put (wire.py). Of a rank on another host only the control words can be read, as they were a while ago.
"""

from __future__ import annotations

from flashmoe_numba.device import (
    acquire_told,
    array_at,
    cas,
    jit,
    ld_acquire,
    ld_relaxed,
    push_control,
    st_release,
    store,
)
from flashmoe_numba.tile_gemm import IN_ORDER, PLACE_WORDS, RANK, ROW_OUT, Rooms

from .control import ABORT, PROGRESS, SILENT
from .row_tiles import is_one_run, room_row, word_of
from .signals import packet_flag, signal_word
from .wire import NO_FLAG, PutRows, first_row, is_remote, put_rows, put_signal

SHOWN_PER_DEADLINE = 32


@jit(inline=True)
def of_peer(segments, peer, at, own):
    """A peer's array like this rank's `own`, which begins at byte `at` of a segment."""
    return array_at(segments.address[peer] + at, own.size, own)


@jit(inline=True)
def room_of(segments, peer, at, own):
    """The same array to be written by this rank: in the stage, if the peer is on another host."""
    return array_at(segments.room[peer] + at, own.size, own)


@jit(inline=True)
def packet_room(p, segments, owner):
    """Where rows for experts of `owner` are written, from `first_row` on for each of them."""
    return room_of(segments, owner, p.dispatch_at, segments.dispatch)


@jit
def tell_packet(p, segments, owner, expert, num_rows):
    """Publish a packet's rows, which may be none."""
    flag = packet_flag(p, p.rank_idx * p.experts_per_rank + expert)
    word = signal_word(p.epoch, p.call, num_rows)
    if is_remote(segments, owner):
        put_packet(p, segments, PutRows(owner, expert, 0, num_rows), p.dispatch_flag_at + 8 * flag, word)
    else:
        flags = of_peer(segments, owner, p.dispatch_flag_at, segments.dispatch_flag)
        st_release(flags, flag, word)


@jit
def put_packet(p, segments, rows, flag_at, word):
    """The same, to another host; in a backward with what rows have beside them."""
    if p.call != 0 and rows.num_rows > 0:
        put_rows(p, segments, rows, p.factors_at, p.factor_bytes, NO_FLAG, 0)
        if p.resends:
            put_rows(p, segments, rows, p.again_at, p.row_bytes, NO_FLAG, 0)
    put_rows(p, segments, rows, p.dispatch_at, p.row_bytes, flag_at, word)


@jit(inline=True)
def result_rooms(p, segments, received, packet, tile):
    """Where the results of a tile that begins in this packet are written: in its source's room, or in several."""
    source, expert = packet // p.experts_per_rank, packet % p.experts_per_rank
    first = first_row(p, segments, source, expert) + tile.slot
    at = IN_ORDER if is_one_run(received, packet, tile) else word_of(tile.hidden, ROW_OUT)
    room = room_of(segments, source, p.result_at, segments.result)
    return Rooms(room, first, received.places, at, segments.room, p.result_at)


@jit(inline=True)
def again_room(p, segments, owner):
    """Where the forward's rows are written once more, for the same experts."""
    return room_of(segments, owner, p.again_at, segments.again)


@jit(inline=True)
def factor_room(p, segments, owner):
    """Where the factors of rows in `packet_room` are written."""
    return room_of(segments, owner, p.factors_at, segments.factors)


@jit
def put_dot(p, segments, received, packet, tile, r, value):
    """Write the gradient of the factor of row r of a tile that begins in this packet beside the row's result."""
    rooms = result_rooms(p, segments, received, packet, tile)
    source = packet // p.experts_per_rank
    if rooms.at >= 0:
        source = received.places[rooms.at - ROW_OUT + RANK + r * PLACE_WORDS]
    room = room_of(segments, source, p.dots_at, segments.dots)
    store(room, room_row(rooms, r), value)  # by a verb: compilers for GPUs see no reader of this view, and leave it out


@jit
def tell_results(p, segments, source, expert, m, slot, num_rows):
    """Publish the results of chunk m, which begins at this slot, of the packet that `source` sent to an expert here."""
    chunk = (p.rank_idx * p.experts_per_rank + expert) * p.row_blocks + m
    word = signal_word(p.epoch, 0, num_rows)
    if is_remote(segments, source):
        put_results(p, segments, PutRows(source, expert, slot, num_rows), p.result_flag_at + 8 * chunk, word)
    else:
        flags = of_peer(segments, source, p.result_flag_at, segments.result_flag)
        st_release(flags, chunk, word)


@jit
def put_results(p, segments, rows, flag_at, word):
    """The same, to another host; in a backward with the gradients of the rows' factors."""
    if p.call != 0:
        put_rows(p, segments, rows, p.dots_at, p.factor_bytes, NO_FLAG, 0)
    put_rows(p, segments, rows, p.result_at, p.row_bytes, flag_at, word)


@jit
def acquire_flag(segments, peer, flags, i):
    """Acquire a flag of this rank that `peer` has set: what it was to tell is visible after."""
    if is_remote(segments, peer):
        return acquire_told(segments.wire, flags, i)
    return ld_acquire(flags, i)


@jit
def tell_abort(p, segments, peer, culprit):
    """Set the abort word of a peer on this host to 1 + the rank to name, unless it is set; returns what it held."""
    return cas(of_peer(segments, peer, p.control_at, segments.control), ABORT, 0, culprit)


@jit
def tell_other_hosts(p, segments):
    """The same for all ranks on others: who hears nothing before hears of this one."""
    for peer in range(p.num_ranks):
        if is_remote(segments, peer):
            put_signal(segments, peer, p.control_at + 8 * ABORT, p.rank_idx + 1)


@jit
def show_control(p, segments):
    """Let ranks of other hosts see, now and then, how far this one is."""
    push_control(segments.wire, segments.remote, p.deadline_ns // SHOWN_PER_DEADLINE)


@jit
def progress_of(p, segments, peer):
    """Tasks that a peer has finished, ever."""
    return ld_relaxed(of_peer(segments, peer, p.control_at, segments.control), PROGRESS)


@jit
def silence_of(p, segments, peer):
    """The last epoch in which a peer's OS block waited for half a deadline."""
    return ld_relaxed(of_peer(segments, peer, p.control_at, segments.control), SILENT)
