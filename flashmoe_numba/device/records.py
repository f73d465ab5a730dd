"""Named tuples as words of memory: a number is a word, of a float32 its bits in the lower half; an array is its address
and its number of elements, and the fields of a tuple lie one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def record_words(record: Any, address_of: Callable[[Any], int]) -> list[int]:
    """The words of a named tuple, or of one of its fields."""
    if isinstance(record, tuple):
        return [word for field in record for word in record_words(field, address_of)]
    if isinstance(record, (int, np.integer)):
        return [int(record)]
    if isinstance(record, (float, np.floating)):
        return [int(np.array(record).view(f"i{np.array(record).itemsize}"))]
    return [address_of(record), record.size]


def read_record(words: np.ndarray, at: int, like: Any, memory_view: Callable[[int, int, np.dtype], Any]) -> Any:
    """What `record_words` wrote, from word `at` on, of the type of `like`."""

    def read(like: Any) -> Any:
        if isinstance(like, tuple):
            return type(like)(*[read(field) for field in like])
        if isinstance(like, (int, np.integer)):
            return next(rest)
        if isinstance(like, (float, np.floating)):
            dtype = np.array(like).dtype
            return np.array(next(rest), f"i{dtype.itemsize}").view(dtype)[()]
        return memory_view(next(rest), next(rest), like.dtype)

    rest = iter(words[int(at) :].tolist())
    return read(like)
