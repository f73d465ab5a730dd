"""Elements of wgmma's operands as numbers, and its sums as float32, for Numba."""

import numpy as np

from ..device.cpu import from_half
from .compiled import njit
from .opcodes import BF16, F16, TF32
from .typed import float_of_bits, u16, u32


@njit
def item_bytes(kind):
    return 4 if kind == TF32 else 2


@njit
def as_float32(shared, at, kind):
    """The float32 that equals an element of an operand."""
    if kind == F16:
        return from_half(u16(shared, at))
    if kind == BF16:
        return float_of_bits(np.uint32(u16(shared, at)) << 16)
    return float_of_bits(u32(shared, at) & ~np.uint32(0x1FFF))


@njit
def cut(exact):
    """float64 as float32, rounded toward zero; what is beyond float32 becomes infinite."""
    near = np.float32(exact)
    if abs(np.float64(near)) > abs(exact) and np.isfinite(near):
        return np.nextafter(near, np.float32(0))
    return near
