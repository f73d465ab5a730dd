"""Numbers and truth values as frameworks give them, made Python's own, and names of element types.

Values that are kept (in configs, seeds, kernel arguments) are plain Python: so they print, compare, hash, become JSON
and TOML, and type a compiled kernel alike, wherever they came from. A `bool` is no number, NumPy's no more than
Python's. Leaves out: rules about values, but that a word is one of some and an integer in a range.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Any

import numpy as np

MOST_BITS = 1023  # of an integer that is a float for sure


def plain(value: Any) -> Any:
    """The Python value of a NumPy scalar or of an array without dimensions; anything else as it is."""
    scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if scalar else value


def is_whole(value: Any) -> bool:
    """Is it an integer of Python's?"""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(name: str, value: Any) -> int:
    """`value` as an integer of Python's; else a TypeError that calls it `name`."""
    value = plain(value)
    if not is_whole(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)


def check_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Nothing, if `value` is an integer in this range; else a TypeError or a ValueError that calls it `name`."""
    if whole(name, value) < least or (most is not None and value > most):
        rule = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {rule}, got {value}")


def number(name: str, value: Any) -> int | float:
    """`value` as an integer or a float of Python's; else a TypeError that calls it `name`.

    Raises:
        ValueError: an integer beyond the range of floats, with which Python cannot even compare it.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ValueError(f"{name} must be in the range of float64, got an integer of {value.bit_length():,} bits")
    return value


def check_one_of(name: str, value: Any, choices: Collection[str]) -> None:
    """Nothing, if `value` is one of the choices; else a ValueError that calls it `name`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_name(name: str, value: Any, choices: Collection[str]) -> None:
    """The same of what must be a string; a TypeError, if it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, one of {', '.join(choices)}; got {value!r}")
    check_one_of(name, value, choices)


def make_plain(instance: Any) -> None:
    """Make every field of a frozen dataclass `plain`; for its `__post_init__`."""
    for field in fields(instance):
        object.__setattr__(instance, field.name, plain(getattr(instance, field.name)))


def dtype_name(dtype: Any) -> Any:
    """The name of `np.dtype("float32")` or `np.float32`, of this machine's byte order; anything else as it is."""
    if not isinstance(dtype, (np.dtype, type)):
        return dtype
    try:
        found = np.dtype(dtype)
    except TypeError:  # a class that is no number's
        return dtype
    return found.name if found.isnative else found.str
