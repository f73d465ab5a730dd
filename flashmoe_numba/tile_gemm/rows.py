"""Where the rows of a tile lie, and where those of its results go: one after the other, or each in its *place*.

A place is four words: a row that is gathered, the row that its result becomes, the rank whose room that is in, and the
row of what is kept of it. Which of them says where a row is follows from the word that `at` begins with (`word_of`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

ROW_IN, ROW_OUT, RANK, KEPT = range(4)  # words of a place
PLACE_WORDS = 4
IN_ORDER = -1  # instead of a word
LOCAL = -1  # instead of a byte


class Rows(NamedTuple):
    """Rows to multiply: row r is the one in word `at + r * PLACE_WORDS` of the places; with IN_ORDER, `first + r`."""

    array: Any  # elements [rows, depth]
    first: int
    places: Any  # int64 [rows, PLACE_WORDS]
    at: int


class Rooms(NamedTuple):
    """Rows for results, likewise. Those with a place are in an array like `array` of the rank that is named RANK -
    ROW_OUT words behind, `byte` bytes into its segment; with LOCAL, in `array` itself, whatever the place.
    """

    array: Any  # elements [rows, columns]
    first: int
    places: Any
    at: int
    address: Any  # int64 [num_ranks]: of the segments
    byte: int


class Runs(NamedTuple):
    """Rows that lie in runs: run q is `rows[at + q * step]` rows from row `first[at + q * step]` on."""

    first: Any  # integers
    rows: Any  # integers
    at: int
    step: int
    number: int


# For any target: whoever compiles them puts them through `jit`; those that return arrays are put into their callers.


def word_of(place: int, word: int) -> int:
    """Index of a word of a place in the places."""
    return place * PLACE_WORDS + word


def nothing_kept(rooms: Rooms) -> Rooms:
    """`Rooms` in which nothing is kept, of the type of these."""
    return Rooms(rooms.array[:0], 0, rooms.places, IN_ORDER, rooms.address, LOCAL)


def row_of(rows: Rows, r: int) -> Any:
    """Index of row r of the tile in `rows.array`."""
    return rows.first + r if rows.at < 0 else rows.places[rows.at + r * PLACE_WORDS]


def room_row(rooms: Rooms, r: int) -> Any:
    """Index of row r of the results in its room."""
    return rooms.first + r if rooms.at < 0 else rooms.places[rooms.at + r * PLACE_WORDS]


def is_local(rooms: Rooms) -> bool:
    """Are all rows in `rooms.array` itself?"""
    return rooms.at < 0 or rooms.byte < 0


def room_address(rooms: Rooms, r: int) -> Any:
    """Where the array begins that row r of the results goes to, if that is not local."""
    return rooms.address[rooms.places[rooms.at + r * PLACE_WORDS + RANK - ROW_OUT]] + rooms.byte
