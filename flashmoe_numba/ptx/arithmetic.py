"""Arithmetic that Numba has no function for: fused, rounded down, approximate, in 16 bits.

Sources: PTX ISA 9.7.3.6 (fma), 9.7.3.21 (ex2), 9.7.9.21 (cvt), 9.7.3.11 (min).
"""

from __future__ import annotations

import math

import numpy as np
from numba.extending import intrinsic

from .compiled import njit

SMALLEST_NORMAL = 2.0**-126


@intrinsic
def fused(typing, a, b, c):
    """a * b + c, rounded once to nearest."""

    def codegen(context, builder, sig, args):
        return builder.fma(*args)

    return a(a, b, c), codegen


@njit
def to_bfloat(bits):
    """float32 bits -> bfloat16 bits, to nearest even; a NaN becomes the one that PTX makes."""
    if bits & 0x7FFFFFFF > 0x7F800000:
        return 0x7FFF
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


@njit
def fused_down(a, b, c):
    """a * b + c in float32, rounded toward minus infinity: the product is exact in float64, the sum's rest is known."""
    product, added = np.float64(a) * np.float64(b), np.float64(c)
    total = product + added
    if not math.isfinite(total):
        return np.float32(total)
    if total == 0:  # exact, and -0 unless both are +0
        return np.float32(-0.0) if math.copysign(1.0, product) < 0 or math.copysign(1.0, added) < 0 else np.float32(0)
    part = total - product
    rest = (product - (total - part)) + (added - part)
    result = np.float32(total)
    if np.float64(result) > total or (np.float64(result) == total and rest < 0):
        return np.nextafter(result, np.float32(-np.inf))
    return result


@njit
def exp2_approximate(x):
    """2 ** x, subnormal values flushed. Hardware may be 2 units in the last place off: so is this, by the bits of x."""
    if abs(x) < SMALLEST_NORMAL:
        return np.float32(1)
    result = np.float32(2.0 ** np.float64(x))
    if not math.isfinite(result) or result == 1:
        return result
    if result < SMALLEST_NORMAL:
        return np.float32(0)
    return away(result, x)


@njit
def away(result, x):
    """Up to 2 units off, by x."""
    steps = int(np.float64(x) * 4096) % 5 - 2
    for _ in range(abs(steps)):
        result = np.nextafter(result, np.float32(np.inf if steps > 0 else -np.inf))
    return result


@njit
def smaller(a, b):
    """The smaller of two, the other one of a NaN, and -0 before +0."""
    if a != a:
        return b
    if b != b:
        return a
    if a == b:
        return a if math.copysign(1.0, a) < 0 else b
    return min(a, b)


@njit
def larger(a, b):
    """The larger of two, likewise, and +0 before -0."""
    if a != a:
        return b
    if b != b:
        return a
    if a == b:
        return b if math.copysign(1.0, a) < 0 else a
    return max(a, b)


@njit
def saturated(x):
    """In [0, 1]; NaN becomes 0."""
    return np.float32(0) if not x > 0 else min(x, np.float32(1))
