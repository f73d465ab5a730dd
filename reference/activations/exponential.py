"""exp in plain arithmetic of one type, float32 or float64, without a branch: compilers vectorise it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Formula = Callable[..., Any]
Compile = Callable[[Formula], Formula]


class _Exp(NamedTuple):
    """x = n ln 2 + r with |r| <= ln 2 / 2, then 2**n times the Taylor polynomial of exp(r)."""

    mantissa_bits: int
    bias: int  # of the exponent
    high: float  # ln 2 in few enough bits that n times it is exact
    low: float  # the rest of ln 2
    degree: int
    least: float  # from here down the result is 0
    most: float  # and from here up it stays


_EXP = {
    np.float32: _Exp(23, 127, 0.693359375, -2.12194440e-4, 7, -88.03, 88.0),
    np.float64: _Exp(52, 1023, 0.6931471803691238, 1.9082149292705877e-10, 13, -709.09, 709.0),
}


def polynomial(real: Any, compiled: Compile, first: float, *others: float) -> Formula:
    """first + x (...), a chain of functions: with a loop in it, a loop over elements would not be vectorised."""
    constant = real(first)
    if not others:
        return compiled(lambda x: constant)
    rest = polynomial(real, compiled, *others)
    return compiled(lambda x: constant + x * rest(x))


def make_exp(real: Any, compiled: Compile, to_bits: Formula, from_bits: Formula) -> Formula:
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
    series = polynomial(real, compiled, *[1 / math.factorial(i) for i in range(e.degree + 1)])

    def exp(x: Any) -> Any:
        x = min(max(x, least), most)
        shifted = x * per_ln2 + magic
        n = shifted - magic
        r = (x - n * high) - n * low
        return series(r) * from_bits(to_bits(shifted) << shift)

    return compiled(exp)
