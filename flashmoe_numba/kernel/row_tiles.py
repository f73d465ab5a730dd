"""Which rows of an expert are multiplied together: those that have come, in the order in which they came.

The rows of an expert form a *stream*: packet after packet as they arrive, each in the order of its slots. Row tiles are
cut off its front, of `tile_m` rows while there are that many, and of what there is when nothing more is waited for
(subscriber.py says when). A tile is named (peer, m) by its first row: m tiles before it began in that peer's packet.

A stream belongs to the lane of the OS block that owns the expert; a tile to whoever acquires its tasks.
"""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_numba.device import copy_row, fetch_add, jit
from flashmoe_numba.tile_gemm import IN_ORDER, KEPT, LOCAL, RANK, ROW_IN, ROW_OUT, Rooms, Rows
from flashmoe_numba.tile_gemm import rows as of_rows

from .in_order import rooms_in_order, rows_in_order
from .queue import HIDDEN_ROWS, counter
from .wire import first_row

row_of, room_row, word_of = map(jit, (of_rows.row_of, of_rows.room_row, of_rows.word_of))

# words of a stream
SEEN = 0  # packets of this epoch, also the empty ones
ARRIVED = 1  # packets with rows
CUT_PACKET, CUT_SLOT = 2, 3  # where the next tile begins: which of those that arrived, and its slot
WAITING = 4  # rows behind that
TILES, QUEUED = 5, 6  # tiles cut, and how many of these are queued
STREAM_WORDS = 8

TILE_WORDS = 4


class CutTile(NamedTuple):
    """A row tile as it lies in `received.tiles`."""

    rows: int
    hidden: int  # its first row in `received.hidden`
    arrival: int  # which of the expert's packets that arrived it begins in
    slot: int  # and where


@jit
def begin_stream(received, expert):
    for word in range(STREAM_WORDS):
        received.streams[expert * STREAM_WORDS + word] = 0


@jit
def append_packet(p, received, expert, source, rows):
    """A packet is here, which may be empty."""
    at = expert * STREAM_WORDS
    packet = source * p.experts_per_rank + expert
    received.rows[packet] = rows
    received.begun[packet] = 0
    received.streams[at + SEEN] += 1
    if rows > 0:
        received.arrived[expert * p.num_ranks + received.streams[at + ARRIVED]] = source
        received.streams[at + ARRIVED] += 1
        received.streams[at + WAITING] += rows


@jit
def packets_missing(p, received, expert):
    return p.num_ranks - received.streams[expert * STREAM_WORDS + SEEN]


@jit
def rows_waiting(received, expert):
    return received.streams[expert * STREAM_WORDS + WAITING]


@jit
def take_tiles(received, expert):
    """(first, end): which of an expert's tiles, as they were cut, are new since this was last asked."""
    at = expert * STREAM_WORDS
    first, end = received.streams[at + QUEUED], received.streams[at + TILES]
    received.streams[at + QUEUED] = end
    return first, end


@jit
def tile_name(p, received, expert, i):
    """(packet, m) of an expert's tile i as they were cut."""
    index = received.cut[expert * p.num_ranks * p.row_blocks + i]
    return index // p.row_blocks, index % p.row_blocks


@jit
def cut_tiles(p, segments, received, queue, expert, least):
    """Cut tiles while at least so many rows wait."""
    at = expert * STREAM_WORDS
    while received.streams[at + WAITING] >= least:
        cut_tile(p, segments, received, queue, expert, min(received.streams[at + WAITING], p.tile_m))


@jit
def cut_tile(p, segments, received, queue, expert, rows):
    """The next `rows` rows of the stream become a tile."""
    at = expert * STREAM_WORDS
    tile = CutTile(
        rows, fetch_add(queue.counters, counter(p, HIDDEN_ROWS), rows),
        received.streams[at + CUT_PACKET], received.streams[at + CUT_SLOT],
    )  # fmt: skip
    packet = received.arrived[expert * p.num_ranks + tile.arrival] * p.experts_per_rank + expert
    index = packet * p.row_blocks + received.begun[packet]
    received.begun[packet] += 1
    write_tile(received, index, tile)
    received.cut[expert * p.num_ranks * p.row_blocks + received.streams[at + TILES]] = index
    received.streams[at + TILES] += 1
    received.streams[at + WAITING] -= rows
    if not is_one_run(received, packet, tile):
        write_places(p, segments, received, expert, tile)
    arrival, slot = tile.arrival, tile.slot + rows
    while arrival < received.streams[at + ARRIVED] and slot >= rows_of_arrival(p, received, expert, arrival):
        slot -= rows_of_arrival(p, received, expert, arrival)
        arrival += 1
    received.streams[at + CUT_PACKET] = arrival
    received.streams[at + CUT_SLOT] = slot


@jit
def rows_of_arrival(p, received, expert, arrival):
    return received.rows[received.arrived[expert * p.num_ranks + arrival] * p.experts_per_rank + expert]


@jit
def write_tile(received, index, tile):
    for word in range(TILE_WORDS):
        received.tiles[index * TILE_WORDS + word] = tile[word]


@jit
def read_tile(received, index):
    at = index * TILE_WORDS
    return CutTile(received.tiles[at], received.tiles[at + 1], received.tiles[at + 2], received.tiles[at + 3])


@jit
def is_one_run(received, packet, tile):
    """Are all rows of a tile that begins in this packet of it?"""
    return tile.slot + tile.rows <= received.rows[packet]


@jit
def write_places(p, segments, received, expert, tile):
    """Say of each row where it lies here, where its result goes, and where it is kept."""
    while tile.rows > 0:
        source, packet, rows = next_run(p, received, expert, tile)
        first = first_row(p, segments, source, expert)
        for r in range(rows):
            at, slot = tile.hidden + r, tile.slot + r
            received.places[word_of(at, ROW_IN)] = packet * p.slots + slot
            received.places[word_of(at, ROW_OUT)] = first + slot
            received.places[word_of(at, RANK)] = source
            received.places[word_of(at, KEPT)] = received.first[packet] + slot
        tile = without_run(tile, rows)


@jit
def next_run(p, received, expert, tile):
    """(source, packet, rows) of those of a tile's rows that are in the packet where it begins."""
    source = received.arrived[expert * p.num_ranks + tile.arrival]
    packet = source * p.experts_per_rank + expert
    return source, packet, min(tile.rows, received.rows[packet] - tile.slot)


@jit
def without_run(tile, rows):
    """What is left of a tile behind its first run, which has so many rows."""
    return CutTile(tile.rows - rows, tile.hidden + rows, tile.arrival + 1, 0)


@jit
def rows_in(p, segments, received, packet, tile):
    """The rows of a tile that begins in this packet, where they came in."""
    at = IN_ORDER if is_one_run(received, packet, tile) else word_of(tile.hidden, ROW_IN)
    return Rows(segments.dispatch, packet * p.slots + tile.slot, received.places, at)


@jit
def kept_rows(received, packet, tile, array):
    """The same rows in an array of kept rows."""
    first = received.first[packet] + tile.slot
    at = IN_ORDER if is_one_run(received, packet, tile) else word_of(tile.hidden, KEPT)
    return Rows(array, first, received.places, at)


@jit
def kept_rooms(received, packet, tile):
    """Where the products with the up matrices are kept."""
    rows = kept_rows(received, packet, tile, received.kept_ups)
    return Rooms(rows.array, rows.first, rows.places, rows.at, received.places, LOCAL)


@jit
def copy_rows(target, source, num_rows, columns):
    """Copy some `Rows` into others, with all lanes."""
    for r in range(num_rows):
        copy_row(target.array, row_of(target, r) * columns, source.array, row_of(source, r) * columns, columns)


@jit
def hidden_rows(received, tile):
    """Its rows between the two products."""
    return rows_in_order(received.hidden, tile.hidden, received.places)


@jit
def hidden_rooms(received, tile):
    """The same, to be filled."""
    return rooms_in_order(received.hidden, tile.hidden, received.places)
