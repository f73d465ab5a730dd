"""gelu_tanh(x) = x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2 (Hendrycks and Gimpel, 2016): x / (1 + exp(-t(x))).

t(x) is `2 sqrt(2/pi) (x + 0.044715 x^3)`. Of -inf it is -inf * 0, NaN.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from .exponential import Compile, Formula

CUBE, FACTOR = 0.044715, 2 * math.sqrt(2 / math.pi)
_RESTS = 2.196021142708559e-18, -9.969308809110920e-17  # of these two numbers, which a float64 has not


class _Real(NamedTuple):
    most: float  # exp(-t / 2) is 0 from here on
    split: float  # a number minus (its product with this, minus itself) has half of the bits: its square is exact


_REAL = {np.float32: _Real(14.0, 2.0**12 + 1), np.float64: _Real(28.0, 2.0**27 + 1)}


def _halves(real: Any, compiled: Compile) -> Formula:
    split = real(_REAL[real].split)

    def halves(a: Any) -> Any:
        high = a * split - (a * split - a)
        return high, a - high

    return compiled(halves)


def make_argument(real: Any, compiled: Compile) -> Formula:
    """Of a = |x|: t(a), and what its rounding left out: an error of t would be as many units of exp(-t)."""
    one, halves = real(1), _halves(real, compiled)
    cube, cube_low = real(CUBE), real(CUBE - float(real(CUBE)) + _RESTS[0])
    factor, factor_low = real(FACTOR), real(FACTOR - float(real(FACTOR)) + _RESTS[1])

    def times(a: Any, b: Any) -> Any:
        """a b, and the error of its rounding (Dekker, 1971)."""
        product = a * b
        (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
        return product, ((a_high * b_high - product) + (a_high * b_low + a_low * b_high)) + a_low * b_low

    product_of = compiled(times)

    def argument(a: Any) -> Any:
        square, square_rest = product_of(a, a)
        cubic, cubic_rest = product_of(cube, square)
        cubic_rest = cubic_rest + (cube * square_rest + cube_low * square)
        total = one + cubic
        part = total - one
        rest = ((one - (total - part)) + (cubic - part)) + cubic_rest
        value, value_rest = product_of(a, total)
        t, t_rest = product_of(factor, value)
        return t, t_rest + (factor * (value_rest + a * rest) + factor_low * value)

    return compiled(argument)


def exact(x: Array) -> Array:
    """For negative x, x exp(-t) / (1 + exp(-t)); exp(-t) in two steps, as it may not be normal where the result is."""
    t, rest = make_argument(np.float64, lambda formula: formula)(np.minimum(np.abs(x), _REAL[np.float64].most))
    root = np.exp(-0.5 * t)
    root = root - root * (0.5 * rest)
    value: Array = x / (1 + root * root)
    return np.where(x < 0, value * root * root, value)


def exact_slope(x: Array) -> Array:
    """As that of silu, with t(x) in the place of x, and its slope as a factor of the second part."""
    a, most = np.abs(x), _REAL[np.float64].most
    t, rest = make_argument(np.float64, lambda formula: formula)(np.minimum(a, most))
    root = np.exp(-0.5 * t)
    root = root - root * (0.5 * rest)
    part = root / (1 + root * root)
    below: Array = (root - a * part * (FACTOR * (1 + 3 * CUBE * np.minimum(a, most) ** 2))) * part
    return np.where(x > 0, 1 - below, below)


def make(real: Any, compiled: Compile, exp: Formula) -> Formula:
    one, half, most = real(1), real(0.5), real(_REAL[real].most)
    argument = make_argument(real, compiled)

    def gelu_tanh(x: Any) -> Any:
        t, rest = argument(min(most, abs(x)))
        root = exp(-half * t)
        root = root - root * (half * rest)
        y = x / (one + root * root)
        return y * root * root if x < 0 else y

    return compiled(gelu_tanh)


def make_slope(real: Any, compiled: Compile, exp: Formula) -> Formula:
    """As `exact_slope`. With root off by 5 u, the terms root part and a part^2 slope are off by 15 u and 22 u."""
    one, half, most = real(1), real(0.5), real(_REAL[real].most)
    factor, cube = real(FACTOR), real(3 * CUBE)
    argument = make_argument(real, compiled)

    def gelu_tanh_slope(x: Any) -> Any:
        a = abs(x)
        near = min(most, a)
        t, rest = argument(near)
        root = exp(-half * t)
        root = root - root * (half * rest)
        part = root / (one + root * root)
        below = (root - a * part * (factor * (one + cube * near * near))) * part
        return one - below if x > 0 else below

    return compiled(gelu_tanh_slope)
