"""The tile GEMM on GPUs: registers the overloads for `Matrices` (lanes/) and for `TmaMatrices` (hopper.py)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from reference.activations import FILES
from reference.formats import FORMATS

from ..device.compilation import jit
from ..device.cuda_api import element_pointer, intrinsic, ir, overload, types
from .activations import VERBS
from .hopper import DEPTH_BYTES, HALF_COLUMNS, INSTRUCTIONS, MAP_WORDS, ROWS, TmaMatrices, main_loop
from .lanes import multiply_tile, sum_products
from .matrices import Matrices
from .stub import tile_gemm, tile_sums


@overload(tile_gemm)
def _tile_gemm(out, out_row, a, a_row, rows, matrices, expert, n, activation, scratch):
    def meaning(out, out_row, a, a_row, rows, matrices, expert, n, activation, scratch):
        multiply_tile(out, out_row, a, a_row, rows, matrices, expert, n, activation, scratch)

    return meaning


def _register(name, verb):
    single, double = (FILES[name].make(real, jit, math.exp) for real in (np.float32, np.float64))

    @overload(verb)
    def _meaning(x):
        return (lambda x: double(x)) if x == types.float64 else (lambda x: single(x))


for _name, _verb in VERBS.items():
    _register(_name, _verb)


@overload(tile_sums)
def _tile_sums(a, a_row, rows, matrices, expert, first, columns, scratch):
    if matrices.instance_class is not Matrices:
        return None

    def meaning(a, a_row, rows, matrices, expert, first, columns, scratch):
        sum_products(a, a_row, rows, matrices, expert, first, columns, scratch)

    return meaning


def _tile_of(rows: int, dtype: str) -> Any:
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
            builder.asm(function, main_loop(rows, dtype), "l,l,r,r,r,r,r,l,~{memory}", operands, True)
            return context.get_dummy_value()

        word = ir.IntType(64)
        return types.void(sums, maps, *[types.int64] * 6), codegen

    return tile


_TILES = {  # by the storage of elements
    str(FORMATS[dtype].storage): {rows: _tile_of(rows, dtype) for rows in ROWS} for dtype in INSTRUCTIONS
}


@overload(tile_sums)
def _tile_sums_by_tensor_cores(a, a_row, rows, matrices, expert, first, columns, scratch):
    if matrices.instance_class is not TmaMatrices:
        return None
    tiles = _TILES[str(a.dtype)]
    tile16, tile32, tile64, tile128 = (tiles[rows] for rows in ROWS)
    elements = DEPTH_BYTES * 8 // a.dtype.bitwidth

    def meaning(a, a_row, rows, matrices, expert, first, columns, scratch):
        blocks = (matrices.depth + elements - 1) // elements
        second = matrices.parts - 1  # the second half: its own matrix, or the next columns of the only one
        second_column = first + (1 - second) * HALF_COLUMNS
        if rows <= 16:
            tile16(scratch.sums, matrices.maps, a_row, first, second_column, expert, blocks, second)
        elif rows <= 32:
            tile32(scratch.sums, matrices.maps, a_row, first, second_column, expert, blocks, second)
        elif rows <= 64:
            tile64(scratch.sums, matrices.maps, a_row, first, second_column, expert, blocks, second)
        else:
            tile128(scratch.sums, matrices.maps, a_row, first, second_column, expert, blocks, second)

    return meaning
