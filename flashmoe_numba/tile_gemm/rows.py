"""Where the rows of a tile lie, and where those of its results go: one after the other, or each in its *place*.

A place is three words: a row that is gathered, the row that its result becomes, and the rank whose room that is in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ROW_IN, ROW_OUT, RANK = range(3)  # words of a place
PLACE_WORDS = 3
IN_ORDER = -1  # instead of the first place


class Rows(NamedTuple):
    """Rows to multiply: row r is that of place `at + r`, or with IN_ORDER row `first + r`."""

    array: Any  # elements [rows, depth]
    first: int
    places: Any  # int64 [rows, PLACE_WORDS]
    at: int


class Rooms(NamedTuple):
    """Rows for results, likewise; those with a place are in an array like `array`, `byte` bytes into a segment."""

    array: Any  # elements [rows, columns]
    first: int
    places: Any
    at: int
    address: Any  # int64 [num_ranks]: of the segments
    byte: int


def row_of(rows: Rows, r: int) -> Any:
    """Index of row r of the tile in `rows.array`."""
    return rows.first + r if rows.at < 0 else rows.places[(rows.at + r) * PLACE_WORDS + ROW_IN]


def room_row(rooms: Rooms, r: int) -> Any:
    """Index of row r of the results in its room."""
    return rooms.first + r if rooms.at < 0 else rooms.places[(rooms.at + r) * PLACE_WORDS + ROW_OUT]


def room_address(rooms: Rooms, r: int) -> Any:
    """Where the array begins that row r of the results goes to, if it has a place."""
    return rooms.address[rooms.places[(rooms.at + r) * PLACE_WORDS + RANK]] + rooms.byte
