"""Heaps in arrays for the compiled engine: one binary heap of events, and pairing heaps for queues and links.

A pairing heap keeps each item's first child and next sibling, so that any number of heaps share arrays as long as all
items, and an item is pushed in constant time. Of equal keys the lower item comes first.
"""

from __future__ import annotations

from typing import Any

from numba import njit

EMPTY = -1


@njit(cache=True)
def event_push(times: Any, keys: Any, items: Any, size: int, time: int, key: int, item: int) -> None:
    """Put (time, key, item) into the heap of `size` events; keys are distinct."""
    hole = size
    while hole > 0:
        parent = (hole - 1) >> 1
        if times[parent] < time or (times[parent] == time and keys[parent] < key):
            break
        times[hole], keys[hole], items[hole] = times[parent], keys[parent], items[parent]
        hole = parent
    times[hole], keys[hole], items[hole] = time, key, item


@njit(cache=True)
def event_pop(times: Any, keys: Any, items: Any, size: int) -> int:
    """Remove the first of `size` events and return its item."""
    first = items[0]
    last = size - 1
    time, key, item = times[last], keys[last], items[last]
    hole = 0
    while True:
        child = 2 * hole + 1
        if child >= last:
            break
        right = child + 1
        if right < last and (
            times[right] < times[child] or (times[right] == times[child] and keys[right] < keys[child])
        ):
            child = right
        if time < times[child] or (time == times[child] and key < keys[child]):
            break
        times[hole], keys[hole], items[hole] = times[child], keys[child], items[child]
        hole = child
    times[hole], keys[hole], items[hole] = time, key, item
    return first


@njit(cache=True)
def meld(keys: Any, child: Any, sibling: Any, a: int, b: int) -> int:
    """The root of two heaps made one; `EMPTY` is a heap."""
    if a == EMPTY:
        return b
    if b == EMPTY:
        return a
    if keys[b] < keys[a] or (keys[b] == keys[a] and b < a):
        a, b = b, a
    sibling[b] = child[a]
    child[a] = b
    return a


@njit(cache=True)
def push(keys: Any, child: Any, sibling: Any, root: int, item: int) -> int:
    """The root after `item`, whose key is set, came in."""
    child[item] = EMPTY
    sibling[item] = EMPTY
    return meld(keys, child, sibling, root, item)


@njit(cache=True)
def pop(keys: Any, child: Any, sibling: Any, root: int) -> int:
    """The root after the first item, `root`, went: its children are melded in pairs, then the pairs, last first."""
    item = child[root]
    pairs = EMPTY
    while item != EMPTY:
        a, b = item, sibling[item]
        if b == EMPTY:
            item = EMPTY
        else:
            item = sibling[b]
            sibling[b] = EMPTY
        sibling[a] = EMPTY
        pair = meld(keys, child, sibling, a, b)
        sibling[pair] = pairs
        pairs = pair
    root = EMPTY
    while pairs != EMPTY:
        item, pairs = pairs, sibling[pairs]
        sibling[item] = EMPTY
        root = meld(keys, child, sibling, root, item)
    return root
