"""What a rank does to its peers: the one module of the kernel that knows how another rank's memory is reached.

Rows for a peer are written into its *room* for them, and then *told*: whoever acquires the signal word sees what this
block stored before. In both directions the room's first index is the rank that writes.
"""

from __future__ import annotations

from flashmoe_numba.device import array_at, cas, jit, ld_relaxed, st_release
from flashmoe_numba.tile_gemm import IN_ORDER, PLACE_WORDS, RANK, ROW_OUT, Rooms

from .control import ABORT, PROGRESS, SILENT
from .row_tiles import is_one_run, room_row, word_of
from .signals import signal_word


@jit(inline=True)
def of_peer(segments, peer, at, own):
    """A peer's array like this rank's `own`, which begins at byte `at` of a segment."""
    return array_at(segments.address[peer] + at, own.size, own)


@jit(inline=True)
def packet_room(p, segments, owner):
    """Where rows for experts of `owner` are written: elements `[num_ranks, experts_per_rank, slots, hidden]`."""
    return of_peer(segments, owner, p.dispatch_at, segments.dispatch)


@jit
def tell_packet(p, segments, owner, packet, num_rows):
    """Publish a packet's rows, which may be none."""
    flags = of_peer(segments, owner, p.dispatch_flag_at, segments.dispatch_flag)
    st_release(flags, packet, signal_word(p.epoch, p.call, num_rows))


@jit(inline=True)
def result_rooms(p, segments, received, packet, tile):
    """Where the results of a tile that begins in this packet are written: in its source's room, or in several."""
    source, expert = packet // p.experts_per_rank, packet % p.experts_per_rank
    first = (p.rank_idx * p.experts_per_rank + expert) * p.slots + tile.slot
    at = IN_ORDER if is_one_run(received, packet, tile) else word_of(tile.hidden, ROW_OUT)
    room = of_peer(segments, source, p.result_at, segments.result)
    return Rooms(room, first, received.places, at, segments.address, p.result_at)


@jit(inline=True)
def again_room(p, segments, owner):
    """Where the forward's rows are written once more, for the same experts."""
    return of_peer(segments, owner, p.again_at, segments.again)


@jit(inline=True)
def factor_room(p, segments, owner):
    """Where the factors of rows in `packet_room` are written."""
    return of_peer(segments, owner, p.factors_at, segments.factors)


@jit
def put_dot(p, segments, received, packet, tile, r, value):
    """Write the gradient of the factor of row r of a tile that begins in this packet beside the row's result."""
    rooms = result_rooms(p, segments, received, packet, tile)
    source = packet // p.experts_per_rank
    if rooms.at >= 0:
        source = received.places[rooms.at - ROW_OUT + RANK + r * PLACE_WORDS]
    room = of_peer(segments, source, p.dots_at, segments.dots)
    room[room_row(rooms, r)] = value


@jit
def tell_results(p, segments, source, e, m, num_rows):
    """Publish the results of chunk m of the packet that `source` sent to expert e of all."""
    flags = of_peer(segments, source, p.result_flag_at, segments.result_flag)
    st_release(flags, e * p.row_blocks + m, signal_word(p.epoch, 0, num_rows))


@jit
def tell_abort(p, segments, peer, culprit):
    """Set a peer's abort word to 1 + the rank to name, unless it is set; returns what it held."""
    return cas(of_peer(segments, peer, p.control_at, segments.control), ABORT, 0, culprit)


@jit
def progress_of(p, segments, peer):
    """Tasks that a peer has finished, ever."""
    return ld_relaxed(of_peer(segments, peer, p.control_at, segments.control), PROGRESS)


@jit
def silence_of(p, segments, peer):
    """The last epoch in which a peer's OS block waited for half a deadline."""
    return ld_relaxed(of_peer(segments, peer, p.control_at, segments.control), SILENT)
