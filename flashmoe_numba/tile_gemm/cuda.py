"""The tile GEMMs on GPUs: registers the overloads for `Matrices` (lanes/) and for `TmaMatrices` (hopper.py)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from reference.formats import FORMATS

from ..device import lane
from ..device.compilation import jit
from ..device.cuda_api import element_pointer, intrinsic, ir, overload, types
from . import rows as of_rows
from .activations import FORMULAS
from .gradients import hidden_gradient, weight_gradient
from .hopper import DEPTH_BYTES, HALF_COLUMNS, INSTRUCTIONS, MAP_WORDS, ROWS, TmaMatrices, main_loop
from .lanes import add_outer_products, derive_tile, multiply_tile, sum_products
from .matrices import Matrices
from .stub import tile_gemm, tile_sums


@overload(tile_gemm)
def _tile_gemm(out, kept, a, rows, matrices, expert, n, form, scratch):
    def meaning(out, kept, a, rows, matrices, expert, n, form, scratch):
        multiply_tile(out, kept, a, rows, matrices, expert, n, form, scratch)

    return meaning


@overload(hidden_gradient)
def _hidden_gradient(kept, out, active, dots, factors, parts, a, rows, matrices, expert, n, form, scratch):
    def meaning(kept, out, active, dots, factors, parts, a, rows, matrices, expert, n, form, scratch):
        derive_tile(kept, out, active, dots, factors, parts, a, rows, matrices, expert, n, form, scratch)

    return meaning


@overload(weight_gradient)
def _weight_gradient(
    out, out_at, out_stride, left, left_stride, left_at, num_left,
    right, right_stride, right_at, num_right, runs, fresh, scratch,
):  # fmt: skip
    def meaning(
        out, out_at, out_stride, left, left_stride, left_at, num_left,
        right, right_stride, right_at, num_right, runs, fresh, scratch,
    ):  # fmt: skip
        add_outer_products(
            out, out_at, out_stride, left, left_stride, left_at, num_left,
            right, right_stride, right_at, num_right, runs, fresh, scratch,
        )  # fmt: skip

    return meaning


def _register(verb, make):
    single, double = (make(real, jit, math.exp) for real in (np.float32, np.float64))

    @overload(verb)
    def _meaning(x):
        return (lambda x: double(x)) if x == types.float64 else (lambda x: single(x))


for _verb, _make in FORMULAS:
    _register(_verb, _make)


@overload(tile_sums)
def _tile_sums(a, first_row, rows, matrices, expert, first, columns, scratch):
    if matrices.instance_class is not Matrices:
        return None

    def meaning(a, first_row, rows, matrices, expert, first, columns, scratch):
        sum_products(a, first_row, rows, matrices, expert, first, columns, scratch)

    return meaning


def _tile_of(rows: int, dtype: str, gathered: bool) -> Any:
    """Intrinsic `f(sums, maps, row, column, column of the second half, expert, blocks of the depth, second map)`."""

    @intrinsic
    def tile(typing, sums, maps, row, column, second_column, expert, blocks, second):
        def codegen(context, builder, sig, args):
            pointer = builder.ptrtoint(element_pointer(context, builder, sums, args[0], ir.IntType(64)(0)), word)
            map_array = element_pointer(context, builder, maps, args[1], ir.IntType(64)(0))
            first_map = builder.ptrtoint(map_array, word)
            second_map = builder.add(first_map, builder.mul(args[7], word(8 * MAP_WORDS)))
            integers = [builder.trunc(value, ir.IntType(32)) for value in args[2:7]]
            operands = [pointer, first_map, *integers, second_map]
            function = ir.FunctionType(ir.VoidType(), [value.type for value in operands])
            builder.asm(function, main_loop(rows, dtype, gathered), "l,l,r,r,r,r,r,l,~{memory}", operands, True)
            return context.get_dummy_value()

        word = ir.IntType(64)
        return types.void(sums, maps, *[types.int64] * 6), codegen

    return tile


def _tile_of_any_height(tiles: list[Any]) -> Any:
    """A function that chooses one of these by the number of rows."""
    tile16, tile32, tile64, tile128 = tiles

    @jit
    def tile(rows, sums, maps, row, column, second_column, expert, blocks, second):
        if rows <= 16:
            tile16(sums, maps, row, column, second_column, expert, blocks, second)
        elif rows <= 32:
            tile32(sums, maps, row, column, second_column, expert, blocks, second)
        elif rows <= 64:
            tile64(sums, maps, row, column, second_column, expert, blocks, second)
        else:
            tile128(sums, maps, row, column, second_column, expert, blocks, second)

    return tile


row_of = jit(of_rows.row_of)
_TILES = {  # by the storage of elements, and whether rows are gathered
    (str(FORMATS[dtype].storage), gathered): _tile_of_any_height([_tile_of(rows, dtype, gathered) for rows in ROWS])
    for dtype in INSTRUCTIONS
    for gathered in (False, True)
}


@overload(tile_sums)
def _tile_sums_by_tensor_cores(a, first_row, rows, matrices, expert, first, columns, scratch):
    if matrices.instance_class is not TmaMatrices:
        return None
    dtype = a.types[0].dtype
    in_order, gathered = (_TILES[str(dtype), kind] for kind in (False, True))
    elements = DEPTH_BYTES * 8 // dtype.bitwidth

    def meaning(a, first_row, rows, matrices, expert, first, columns, scratch):
        blocks = (matrices.depth + elements - 1) // elements
        second = matrices.parts - 1  # the second half: its own matrix, or the next columns of the only one
        second_column = first + (1 - second) * HALF_COLUMNS
        if a.at < 0:
            row = row_of(a, first_row)
            in_order(rows, scratch.sums, matrices.maps, row, first, second_column, expert, blocks, second)
        else:
            row = row_of(a, first_row + min(lane(), rows - 1))  # the thread's own; those beyond repeat the last
            gathered(rows, scratch.sums, matrices.maps, row, first, second_column, expert, blocks, second)

    return meaning
