"""silu(x) = x / (1 + exp(-x)); silu(-inf) is -inf * 0, NaN."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from .exponential import Compile, Formula


def exact(x: Array) -> Array:
    """x / (1 + exp(-x)); for negative x, x exp(x) / (1 + exp(x)) with exp(x) in two steps, as x exp(x) may be a normal
    number where exp(x) is not."""
    root = np.exp(-0.5 * np.abs(x))
    value: Array = x / (1 + root * root)
    return np.where(x < 0, value * root * root, value)


def exact_slope(x: Array) -> Array:
    """As silu(x) is x + silu(-x), the slope at x is 1 less that at -x, which for negative x is p / (1 + p) - |x| p /
    (1 + p)^2, p = exp(x). NaN at infinities, where a part is inf * 0."""
    t = np.abs(x)
    root = np.exp(-0.5 * t)
    part = root / (1 + root * root)
    below: Array = (root - t * part) * part
    return np.where(x > 0, 1 - below, below)


def make(real: Any, compiled: Compile, exp: Formula) -> Formula:
    """x / (1 + exp(-x)). For negative x it is x exp(x) / (1 + exp(x)), and exp(x) in two steps, as it may not be normal
    where the result is."""
    one, half = real(1), real(0.5)

    def silu(x: Any) -> Any:
        root = exp(-half * abs(x))
        y = x / (one + root * root)
        return y * root * root if x < 0 else y

    return compiled(silu)


def make_slope(real: Any, compiled: Compile, exp: Formula) -> Formula:
    """As `exact_slope`. With root off by 4 u (two units), the terms root part and t part^2 are off by 13 u and 16 u."""
    one, half = real(1), real(0.5)

    def silu_slope(x: Any) -> Any:
        t = abs(x)
        root = exp(-half * t)
        part = root / (one + root * root)
        below = (root - t * part) * part
        return one - below if x > 0 else below

    return compiled(silu_slope)
