"""Micro-kernels of every height against the chain of fused multiply-adds that they promise, bit for bit."""

from fractions import Fraction

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits
from test_tile_gemm import Product, make_product

from flashmoe_numba.tile_gemm import Scratch
from flashmoe_numba.tile_gemm.micro_kernel import DEPTH_BLOCK, FUSED, MICRO_ROWS, ROW_STRIDE

pytestmark = pytest.mark.skipif(not FUSED, reason="this CPU has no fused multiply-add")


def fused_to_odd(a, b, c):
    """a * b + c of float32 arrays in float64, rounded to odd: it may be rounded again, to float32, as if only once.

    Source: S. Boldo and G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding
    to odd", IEEE Transactions on Computers 57(4), 2008.
    """
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    inexact = np.isfinite(total) & (error != 0) & (total.view(np.int64) % 2 == 0)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)


def fused32(a, b, c):
    """a * b + c of float32 arrays, rounded once."""
    return fused_to_odd(a, b, c).astype(np.float32)


fused64 = np.frompyfunc(lambda a, b, c: float(Fraction(a) * Fraction(b) + Fraction(c)), 3, 1)


def chain(x, w):
    """x @ w.T in the accumulator's type: one chain of fused multiply-adds for each element, in depth order."""
    real = np.float64 if x.dtype == np.float64 else np.float32
    x, w = x.astype(real), w.astype(real)
    sums = np.zeros((len(x), len(w)), real)
    for k in range(x.shape[1]):
        a, b = np.broadcast_arrays(x[:, k, None], w[:, k])
        sums = fused32(a, b, sums) if real is np.float32 else fused64(a, b, sums).astype(real)
    return sums


def plain_product(dtype, rows, depth, columns):
    """No activation, no bias: what is left is the chain, rounded to the element type."""
    product = make_product(dtype, rows, depth, columns, False, "identity")
    return Product(dtype, product.x, product.w, [np.zeros_like(b) for b in product.b], "identity")


def first_rows(product, rows):
    return Product(product.dtype, product.x[:rows].copy(), product.w, product.b, product.activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_heights_are_one_chain(dtype):
    """Every number of rows up to two whole groups and one; odd columns and depth, more than a panel and a block."""
    num_rows = 2 * MICRO_ROWS + 1
    product = plain_product(dtype, num_rows, DEPTH_BLOCK + 3, 19 if dtype == "float64" else 41)
    sums = chain(product.x, product.w[0]) + product.b[0]
    expected = sums.astype(product.x.dtype)
    for rows in range(1, num_rows + 1):
        got = first_rows(product, rows).run(tile_n=35)
        assert_same_bits(got, expected[:rows], f"{dtype}, {rows} rows")


@pytest.mark.parametrize("rows", [1, MICRO_ROWS - 1, MICRO_ROWS, 2 * MICRO_ROWS + 1])
def test_bits_do_not_depend_on_the_room_for_rows(rows):
    """Room for one depth block of the rows, for two of them and some more, and for all four."""
    product = make_product("float32", rows, 3 * DEPTH_BLOCK + 5, 67, True, "silu")
    expected = product.run(tile_n=64)
    for room in (rows, 2 * rows + 1, 3 * rows, 4 * rows):
        scratch = Scratch(np.empty(room * ROW_STRIDE, np.float32), np.empty(rows * 256, np.float32))
        assert_same_bits(product.run(tile_n=64, scratch=scratch), expected, f"{rows} rows, room for {room}")
