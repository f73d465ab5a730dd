"""exp, silu and gelu in plain arithmetic of one type, float32 or float64, without a branch: compilers vectorise them.

Infinities, NaN and the sign of zero come out as the definitions' limits in IEEE arithmetic do: silu(-inf) and
gelu(-inf) are -inf * 0, NaN. Where the result is a normal number, silu and gelu are within MOST_ULPS units in the last
place; below that the error is less than the smallest normal number. Multiply-adds that a compiler fuses do no harm.

A formula is made for a type and for a way to compile: `compiled` is device.jit, or nothing for interpreted code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MOST_ULPS = 7.0
Formula = Callable[[Any], Any]


class _Exp(NamedTuple):
    """x = n ln 2 + r with |r| <= ln 2 / 2, then 2**n times the Taylor polynomial of exp(r)."""

    mantissa_bits: int
    bias: int  # of the exponent
    high: float  # ln 2 in few enough bits that n times it is exact
    low: float  # the rest of ln 2
    degree: int
    least: float  # from here down the result is 0
    most: float  # and from here up it stays


class _Tail(NamedTuple):
    """P(-X > t) = exp(-t^2 / 2) m(t) for normal X: m as a polynomial of q - 1/2, q = 1 / (1 + t/4), divided by q.

    It interpolates m(t) / q at Chebyshev's nodes in q (mpmath, 40 digits), to 1e-8 for t < 14 and to 2e-16 for t < 39.
    """

    most: float  # exp(-t^2 / 2) is 0 from here on
    split: float  # a number minus (its product with this, minus itself) has half of the bits: its square is exact
    coefficients: tuple[float, ...]


_EXP = {
    np.float32: _Exp(23, 127, 0.693359375, -2.12194440e-4, 7, -88.03, 88.0),
    np.float64: _Exp(52, 1023, 0.6931471803691238, 1.9082149292705877e-10, 13, -709.09, 709.0),
}
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


def _polynomial(real: Any, compiled: Any, first: float, *others: float) -> Formula:
    """first + x (...), a chain of functions: with a loop in it, a loop over elements would not be vectorised."""
    constant = real(first)
    if not others:
        return compiled(lambda x: constant)
    rest = _polynomial(real, compiled, *others)
    return compiled(lambda x: constant + x * rest(x))


def make_exp(real: Any, compiled: Any, to_bits: Formula, from_bits: Formula) -> Formula:
    """exp to two units in the last place; 0 where the result is not normal, and constant above 1e38 or 1e307.

    Args:
        to_bits, from_bits: the pattern of a number as a signed integer, and back.
    """
    e = _EXP[real]
    # Adding it rounds to an integer, and leaves that plus the bias in the low bits: the exponent of 2**n.
    magic = real(1.5 * 2.0**e.mantissa_bits + e.bias)
    per_ln2, high, low = real(1 / math.log(2)), real(e.high), real(e.low)
    least, most = real(e.least), real(e.most)
    shift = np.int32(e.mantissa_bits) if real is np.float32 else np.int64(e.mantissa_bits)
    series = _polynomial(real, compiled, *[1 / math.factorial(i) for i in range(e.degree + 1)])

    def exp(x):
        x = min(max(x, least), most)
        shifted = x * per_ln2 + magic
        n = shifted - magic
        r = (x - n * high) - n * low
        return series(r) * from_bits(to_bits(shifted) << shift)

    return compiled(exp)


def make_silu(real: Any, compiled: Any, exp: Formula) -> Formula:
    """x / (1 + exp(-x)). For negative x it is x exp(x) / (1 + exp(x)), and exp(x) in two steps, as it may not be normal
    where the result is."""
    one, half = real(1), real(0.5)

    def silu(x):
        root = exp(-half * abs(x))
        y = x / (one + root * root)
        return y * root * root if x < 0 else y

    return compiled(silu)


def make_gelu(real: Any, compiled: Any, exp: Formula) -> Formula:
    """x P(X < x) for normal X: x tail(-x), or x - x tail(x), so that nothing cancels.

    The rounding of a square s would cost s units in the last place of exp(-s / 2), so its error is computed and put in.
    """
    one, half, quarter = real(1), real(0.5), real(0.25)
    tail = _TAIL[real]
    most, split = real(tail.most), real(tail.split)
    series = _polynomial(real, compiled, *tail.coefficients)

    def gelu(x):
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
