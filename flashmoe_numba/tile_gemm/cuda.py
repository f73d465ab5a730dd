"""The tile GEMM on GPUs: registers the overloads for `Matrices`."""

from __future__ import annotations

from ..device.cuda_api import overload
from .lanes import multiply_tile, sum_products
from .matrices import Matrices
from .stub import tile_gemm, tile_sums


@overload(tile_gemm)
def _tile_gemm(out, out_row, a, a_row, rows, matrices, expert, n, activation, scratch):
    def meaning(out, out_row, a, a_row, rows, matrices, expert, n, activation, scratch):
        multiply_tile(out, out_row, a, a_row, rows, matrices, expert, n, activation, scratch)

    return meaning


@overload(tile_sums)
def _tile_sums(a, a_row, rows, matrices, expert, first, columns, scratch):
    if matrices.instance_class is not Matrices:
        return None  # hopper.py

    def meaning(a, a_row, rows, matrices, expert, first, columns, scratch):
        sum_products(a, a_row, rows, matrices, expert, first, columns, scratch)

    return meaning
