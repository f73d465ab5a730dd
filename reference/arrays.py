"""Small things about arrays that every module here needs: a type, an argument check and seeded streams.

Leaves out anything that knows about experts or ranks.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .formats import DTYPES
from .scalars import whole

Array: TypeAlias = npt.NDArray[Any]


def check_array(name: str, value: object, shape: tuple[int | None, ...]) -> Array:
    """`value` as it is, if it is a NumPy array of `shape`; None in `shape` stands for any length.

    Raises:
        TypeError, ValueError: naming the argument and both shapes.
    """
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(value).__name__}")
    same = len(shape) == value.ndim and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
    if not same:
        rule = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape [{rule}], got {list(value.shape)}")
    return value


def check_floating(name: str, value: Array) -> Array:
    """`value` as it is, if its dtype is one of `formats.DTYPES`; else TypeError."""
    if value.dtype.name not in DTYPES:
        raise TypeError(f"{name} must have a floating dtype ({', '.join(DTYPES)}), got {value.dtype}")
    return value


def overflowed(values: Array, dtype: np.dtype[Any]) -> Array:
    """`values`, but infinite where rounding to `dtype` makes them so; nothing else is rounded."""
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.isinf(values.astype(dtype)), np.copysign(np.inf, values), values)


def check_seed(seed: int) -> int:
    """`seed` as a Python integer, if it is a non-negative one; else TypeError or ValueError."""
    seed = whole("seed", seed)
    if seed < 0:
        raise ValueError(f"seed must be >= 0, got {seed}")
    return seed


def stream(seed: int, *key: int) -> np.random.Generator:
    """The random stream of `key` under `seed`: independent of every other key, and the same on every rank."""
    return np.random.default_rng(np.random.SeedSequence(check_seed(seed), spawn_key=key))
