"""Heaps in record arrays for the compiled engine: one binary heap of events, and pairing heaps for queues and links.

A pairing heap keeps each item's first child and next sibling, so that any number of heaps share an array as long as all
items, and an item is pushed in constant time. Of equal keys the one of the lower turn comes first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numba import njit

from reference.code_cache import CodeCache, compiler_is_off

Function = TypeVar("Function", bound=Callable[..., Any])
SOURCES = ("heaps.py", "loop.py", "plain.py", "graph.py")  # of what is compiled, constants included
COMPILES = not compiler_is_off()


def compiled(function: Function) -> Function:
    """By Numba, in one piece and without its reference counts, for nothing here makes an array.

    Counting takes a third of an event's time, and handing arrays from function to function a quarter.
    """
    options: dict[str, Any] = dict(nogil=True, error_model="numpy", _nrt=False, forceinline=True)
    result: Function = njit(**options)(function)
    return result


def entry(function: Function) -> Function:
    """A `compiled` function that Python calls; it is kept on the disk."""
    made: Any = compiled(function)
    if COMPILES:
        made._cache = CodeCache(function, _source_hash())
    result: Function = made
    return result


@cache
def _source_hash() -> str:
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()


EMPTY = -1
EVENT = np.dtype([("time", np.int64), ("key", np.int64), ("item", np.int64)])


def heap_dtype(key: Any) -> np.dtype[Any]:
    """An item of pairing heaps with keys of this type."""
    return np.dtype([("key", key), ("turn", np.int64), ("child", np.int64), ("sibling", np.int64)])


@compiled
def event_push(events: Any, size: int, time: int, key: int, item: int) -> None:
    """Put (time, key, item) into the heap of `size` events; no two have the same time and key."""
    hole = size
    while hole > 0:
        parent = (hole - 1) >> 1
        above = events[parent]
        if above.time < time or (above.time == time and above.key < key):
            break
        events[hole] = above
        hole = parent
    events[hole].time = time
    events[hole].key = key
    events[hole].item = item


@compiled
def event_pop(events: Any, size: int) -> int:
    """Remove the first of `size` events and return its item.

    The gap goes down to a leaf and the last event up from there: it belongs low, so that takes fewer comparisons than
    one at each level on the way down, by two fifths of the time.
    """
    first: int = events[0].item
    last = size - 1
    hole, child = 0, 1
    while child + 1 < last:
        left, right = events[child], events[child + 1]
        child += (right.time < left.time) | ((right.time == left.time) & (right.key < left.key))
        events[hole] = events[child]
        hole = child
        child = 2 * hole + 1
    if child < last:
        events[hole] = events[child]
        hole = child
    event_push(events, hole, events[last].time, events[last].key, events[last].item)
    return first


@compiled
def meld(items: Any, a: int, b: int) -> int:
    """The root of two heaps made one, neither of them empty."""
    if items[b].key < items[a].key or (items[b].key == items[a].key and items[b].turn < items[a].turn):
        a, b = b, a
    items[b].sibling = items[a].child
    items[a].child = b
    return a


@compiled
def push(items: Any, root: int, item: int, key: Any, turn: int) -> int:
    """The root after `item` came in."""
    items[item].key = key
    items[item].turn = turn
    items[item].child = EMPTY
    items[item].sibling = EMPTY
    return item if root == EMPTY else meld(items, root, item)


@compiled
def pop(items: Any, root: int) -> int:
    """The root after the first item, `root`, went: its children are melded in pairs, then the pairs, last first."""
    item = items[root].child
    pairs = EMPTY
    while item != EMPTY:
        pair = item
        other = items[item].sibling
        item = EMPTY
        if other != EMPTY:
            item = items[other].sibling
            pair = meld(items, pair, other)
        items[pair].sibling = pairs
        pairs = pair
    if pairs == EMPTY:
        return EMPTY
    root = pairs
    item = items[root].sibling
    while item != EMPTY:
        after = items[item].sibling
        root = meld(items, root, item)
        item = after
    items[root].sibling = EMPTY
    return root
