"""relu(x) = max(x, 0); of NaN it is NaN, and a zero keeps its sign."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from .exponential import Compile, Formula


def exact(x: Array) -> Array:
    return np.where(x < 0, 0.0, x)


def exact_slope(x: Array) -> Array:
    """0 at 0, as PyTorch has it."""
    return np.where(x > 0, 1.0, np.where(x <= 0, 0.0, x))


def make(real: Any, compiled: Compile, exp: Formula) -> Formula:
    zero = real(0)
    return compiled(lambda x: x if not x < zero else zero)


def make_slope(real: Any, compiled: Compile, exp: Formula) -> Formula:
    zero, one = real(0), real(1)
    return compiled(lambda x: one if x > zero else x if not x <= zero else zero)
