"""CuTe's layouts in a few lines: where the layouts of TMA, descriptors and fragments are derived a second time.

A layout is a shape and a stride of the same nesting. Coordinates and indices count colexicographically, the leftmost
mode fastest, as in CUTLASS, media/docs/cpp/cute/01_layout.md. The layouts at the end are those of CUTLASS, mma_traits
for SM90, of which the PTX ISA quotes some (9.7.15.5.1.2.1.3).
"""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Layout:
    """A function from coordinates, or from one index of all, to an offset: `Layout(shape, stride)`."""

    shape: int | tuple
    stride: int | tuple

    def __call__(self, *coordinate):
        return offset(coordinate if len(coordinate) > 1 else coordinate[0], self.shape, self.stride)


def size(shape):
    return shape if isinstance(shape, int) else prod(map(size, shape))


def offset(coordinate, shape, stride):
    """A coordinate may be an index wherever the shape has modes."""
    if isinstance(shape, int):
        return coordinate * stride
    if isinstance(coordinate, int):
        coordinate = split(coordinate, shape)
    return sum(map(offset, coordinate, shape, stride))


def split(index, shape):
    """The coordinate of an index; the last mode takes what is left, so that layouts go on beyond their shape."""
    coordinate = []
    for mode in shape[:-1]:
        index, rest = divmod(index, size(mode))
        coordinate.append(rest)
    return (*coordinate, index)


@dataclass(frozen=True)
class Swizzle:
    """`bits` bits from `base + shift` on go, by XOR, into those from `base` on (CUTLASS, cute/swizzle.hpp)."""

    bits: int
    base: int
    shift: int

    def __call__(self, index):
        source = index & ((1 << self.bits) - 1) << self.base + self.shift
        return index ^ source >> self.shift


SW128 = Swizzle(3, 4, 3)  # of byte addresses
SWIZZLES = (Swizzle(0, 4, 3), Swizzle(1, 4, 3), Swizzle(2, 4, 3), SW128)  # by CUtensorMapSwizzle


def atom_k_sw128(item_bytes):
    """(swizzle, layout) in elements of an 8-row atom of a K-major operand: Sw<3,4,3> o (8, 64) : (64, 1) of 16 bits."""
    length = 128 // item_bytes
    return Swizzle(3, 4 - item_bytes.bit_length() + 1, 3), Layout((8, length), (length, 1))


def canonical_k_sw128(item_bytes, num_groups, stride_bytes):
    """Elements of a K-major operand of one wgmma before the swizzle: ((8, m), (T, 2)) : ((8 T, SBO), (1, T))."""
    t = 16 // item_bytes
    return Layout(((8, num_groups), (t, 2)), ((8 * t, stride_bytes // item_bytes), (1, t)))


def accumulator(n):
    """(thread, register) to an index into D `[64, n]`, column by column: CLayout_64xN."""
    return Layout(((4, 8, 4), (2, 2, n // 8)), ((128, 1, 16), (64, 8, 512)))
