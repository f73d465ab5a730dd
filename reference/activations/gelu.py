"""gelu(x) = x P(X < x) for a normal X, x (1 + erf(x / sqrt 2)) / 2; gelu(-inf) is -inf * 0, NaN."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..arrays import Array
from .exponential import Compile, Formula, polynomial


def exact(x: Array) -> Array:
    """x tail(-x), or x - x tail(x), so that nothing cancels; tail(t) = mills root^2."""
    t = np.minimum(np.abs(x), _ZERO)
    root = _root(t)
    near, below = t < _FAR, np.minimum(x, _ZERO)
    below = np.where(near, below * (_erfc(t * 0.5**0.5) / 2), below * _mills(np.maximum(t, _FAR)) * root * root)
    return np.where(x > 0, x - below, below)


def exact_slope(x: Array) -> Array:
    """P(X < x) + x density(x), which for positive x is 1 less that at -x. NaN at infinities, where x density(x) is."""
    a = np.abs(x)
    t = np.minimum(a, _ZERO)
    root, steep = _root(t), a * (2 * np.pi) ** -0.5
    near = _erfc(t * 0.5**0.5) / 2 - steep * root * root
    below: Array = np.where(t < _FAR, near, (_mills(np.maximum(t, _FAR)) - steep) * root * root)
    return np.where(x > 0, 1 - below, below)


_FAR = 2.0  # from here on erfc(t / sqrt 2) would multiply the rounding of its argument by more than t^2
_ZERO = 80.0  # from here on root is 0


def _root(t: Array) -> Array:
    """exp(-t^2 / 4)."""
    high = t.astype(np.float32).astype(np.float64)  # its square is exact
    root: Array = np.exp(-0.25 * high * high) * np.exp(-0.25 * (t - high) * (t + high))
    return root


def _mills(t: Array) -> Array:
    """P(X > t) exp(t^2 / 2) for t >= _FAR, by Laplace's continued fraction 1/(t + 1/(t + 2/(t + 3/(t + ...))))."""
    value = t
    for n in range(100, 0, -1):
        value = t + n / value
    mills: Array = 1 / (value * (2 * np.pi) ** 0.5)
    return mills


def _erfc(x: Array) -> Array:
    """The complementary error function to the last bit or so, from the C library: about 60 ns per element."""
    values = np.fromiter(map(math.erfc, x.ravel().tolist()), np.float64, count=x.size)
    return values.reshape(x.shape)


class _Tail(NamedTuple):
    """P(-X > t) = exp(-t^2 / 2) m(t) for normal X: m as a polynomial of q - 1/2, q = 1 / (1 + t/4), divided by q.

    It interpolates m(t) / q at Chebyshev's nodes in q (mpmath, 40 digits), to 1e-8 for t < 14 and to 2e-16 for t < 39.
    """

    most: float  # exp(-t^2 / 2) is 0 from here on
    split: float  # a number minus (its product with this, minus itself) has half of the bits: its square is exact
    coefficients: tuple[float, ...]


_TAIL = {
    np.float32: _Tail(15.0, 2.0**12 + 1, (
        0.1888212846, 0.3039483091, 0.3871366841, 0.3730453698, 0.2416267549,
        0.06023400562, -0.05641893921, -0.05031417214, 0.01288075074, 0.01538360334,
    )),
    np.float64: _Tail(39.0, 2.0**27 + 1, (
        0.188821282603937882, 0.303948320985945498, 0.387137400742204486, 0.373043715919547188,
        0.24158629956550129, 0.0603215117048469593, -0.055675077990564082, -0.0521861889789415299,
        0.00853403926254272937, 0.0295800990076149794, -0.000488554912131090978, -0.0179930771160757694,
        0.000733814253480729311, 0.0121126504059592006, -0.0025712321911593588, -0.00828142094096351622,
        0.00434890202475065347, 0.00470223227052304209, -0.00494692518758364035, -0.000953656195898341333,
        0.00308766115931987685, -0.00115219265885167767,
    )),
}  # fmt: skip


def make(real: Any, compiled: Compile, exp: Formula) -> Formula:
    """x P(X < x) for normal X: x tail(-x), or x - x tail(x), so that nothing cancels.

    The rounding of a square s would cost s units in the last place of exp(-s / 2), so its error is computed and put in.
    """
    one, half, quarter = real(1), real(0.5), real(0.25)
    tail = _TAIL[real]
    most, split = real(tail.most), real(tail.split)
    series = polynomial(real, compiled, *tail.coefficients)

    def gelu(x: Any) -> Any:
        t = min(most, abs(x))  # most for a NaN: of two NaN factors, which one stays would be up to a compiler
        q = one / (one + quarter * t)
        m = series(q - half) * q
        square = t * t
        high = t * split - (t * split - t)
        low = t - high
        rest = (high * high - square + (high + high) * low) + low * low
        power = exp(-half * square)
        power = power - power * (half * rest)
        y = min(x, most) * m * power
        return x - y if x > 0 else y

    return compiled(gelu)


def make_slope(real: Any, compiled: Compile, exp: Formula) -> Formula:
    """tail(t) - t density(t) at -t, and 1 less that at t; by exp(-t^2 / 4), as exp(-t^2 / 2) may not be normal where
    t times it is. With that off by 5 u and m by 6 u, the terms are off by 20 u and 16 u."""
    one, half, quarter, density = real(1), real(0.5), real(0.25), real((2 * math.pi) ** -0.5)
    tail = _TAIL[real]
    most, split = real(1.5 * tail.most), real(tail.split)  # exp(-t^2 / 4) is 0 from there on
    series = polynomial(real, compiled, *tail.coefficients)

    def gelu_slope(x: Any) -> Any:
        a = abs(x)
        t = min(most, a)
        q = one / (one + quarter * t)
        m = series(q - half) * q
        square = t * t
        high = t * split - (t * split - t)
        low = t - high
        rest = (high * high - square + (high + high) * low) + low * low
        root = exp(-quarter * square)
        root = root - root * (quarter * rest)
        below = (m - density * a) * root * root
        return one - below if x > 0 else below

    return compiled(gelu_slope)
