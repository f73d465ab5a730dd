"""Elements of wgmma's operands as numbers, and its sums as float32, for Numba."""

import numpy as np

from .compiled import njit
from .typed import float_of_bits

F16, BF16, TF32 = range(3)  # kinds of operands


@njit
def item_bytes(kind):
    return 4 if kind == TF32 else 2


@njit
def as_float32(shared, at, kind):
    """The float32 that equals an element of an operand."""
    return float_of_bits(float32_bits(shared, at, kind))


@njit
def float32_bits(shared, at, kind):
    low = np.uint32(shared[at]) | np.uint32(shared[at + 1]) << 8
    if kind == BF16:
        return low << 16
    if kind == TF32:
        return (low & 0xE000) | np.uint32(shared[at + 2]) << 16 | np.uint32(shared[at + 3]) << 24
    return _half_as_float32(low)


@njit
def _half_as_float32(half):
    sign, exponent, fraction = half >> 15 << 31, half >> 10 & 31, half & 1023
    if exponent == 31:  # infinite, or no number
        return sign | 255 << 23 | fraction << 13
    if exponent:
        return sign | exponent + 112 << 23 | fraction << 13
    if not fraction:
        return sign
    exponent = 113  # of 2 ** -14; the fraction has no leading one yet
    while fraction < 1024:
        fraction, exponent = fraction << 1, exponent - 1
    return sign | exponent << 23 | (fraction & 1023) << 13


@njit
def cut(exact):
    """float64 as float32, rounded toward zero; what is beyond float32 becomes infinite."""
    near = np.float32(exact)
    if abs(np.float64(near)) > abs(exact) and np.isfinite(near):
        return np.nextafter(near, np.float32(0))
    return near
