"""The tile GEMM on CPUs: batch-invariant, at BLAS speed.

Every element of a product is one chain of operations in the order of the depth index, whatever the tile's height, the
row's place in it or the column tile; the class of the weights says which (arithmetic.py). So a row's bits do not depend
on how tokens fall into tiles and ranks. (A BLAS chooses its reduction order by the shape of the call.)

The loops are the classic ones: the rows are copied (and converted to the accumulator's type, or where weights are words
of two just put side by side), as many depth blocks of them as there is room for, and for each panel of weights and each
depth block a register-blocked micro-kernel runs over all groups of rows while that part of the panel stays in the
first-level cache. Partial sums go to memory between depth blocks, which rounds nothing. A group of fewer rows has a
micro-kernel of its height, so that a product of few rows takes as long as reading its weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.cgutils import memset, raw_memcpy
from numba.extending import intrinsic, overload

from ..device.compilation import jit
from ..device.cpu import PART_OPTIONS, element_pointer, flush_denormals, keep_denormals
from ..device.vocabulary import array_at, load, store
from . import amx, stub
from . import rows as of_rows
from .arithmetic import by_instruction
from .cpu_activations import activate
from .cpu_forms import activate_bound
from .forms import PLAIN
from .micro_kernel import (
    DEPTH_BLOCK,
    MICRO_ROWS,
    MICRO_VECTORS,
    ROW_STRIDE,
    VECTOR_BYTES,
    fma_kernel,
    pair_kernel,
    tile_kernel,
)
from .panels import PairPanels, Panels, TilePanels, pair_words

ROW_STEP = amx.TILE_ROWS if amx.BY_AMX else 1  # rows and sums have room for a multiple of it


def panel_width(accumulator: np.dtype) -> int:
    """Columns of a weight panel for float32 or float64 sums."""
    return MICRO_VECTORS * VECTOR_BYTES // np.dtype(accumulator).itemsize


_row_of, _room_row, _room_address, _is_local = map(
    jit, (of_rows.row_of, of_rows.room_row, of_rows.room_address, of_rows.is_local)
)


@jit
def _copy_rows(copy, copy_at, a, rows, depth, first, columns):
    """Columns from `first` on of the rows to copy, `ROW_STRIDE` apart."""
    for r in range(rows):
        source = _row_of(a, r) * depth + first
        for k in range(columns):
            store(copy, copy_at + r * ROW_STRIDE + k, load(a.array, source + k))


@intrinsic
def _copy_padded(typing, copy, at, array, source, num_elements, num_words):
    """16-bit elements side by side into words of 32 bits, and zeros into what is left of the words."""

    def codegen(context, builder, sig, args):
        byte, word = ir.IntType(8), ir.IntType(64)
        target = builder.bitcast(element_pointer(context, builder, sig.args[0], args[0], args[1]), byte.as_pointer())
        elements = element_pointer(context, builder, sig.args[2], args[2], args[3])
        raw_memcpy(builder, target, elements, args[4], 2, align=2)
        copied = builder.mul(args[4], word(2))
        left = builder.sub(builder.mul(args[5], word(4)), copied)
        memset(builder, builder.gep(target, [copied]), left, 0)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(copy, i64, array, i64, i64, i64), codegen


@jit
def _copy_pairs(copy, copy_at, a, rows, depth, first, columns):
    """Words from `first` on of the rows, likewise."""
    for r in range(rows):
        source = _row_of(a, r) * depth + 2 * first
        _copy_padded(copy, copy_at + r * ROW_STRIDE, a.array, source, min(2 * columns, depth - 2 * first), columns)


class _Way(NamedTuple):
    """How weights of one form are multiplied: what loops over tiles are made of, as kernel functions and numbers."""

    words: Any  # of a depth: what is counted in a row of the copy and in a panel
    copy_rows: Any
    micro_kernel: Any
    group_rows: int  # that a micro-kernel takes at a time
    row_step: int  # the copy has room for a multiple of so many rows
    begin: Any
    end: Any


def _make_multiply(way):
    words, copy_rows, micro_kernel, group_rows, row_step, begin, end_of_it = way

    @jit
    def multiply(a, rows, matrices, tile_index, panels, width, stride, scratch):
        """scratch.sums[rows, stride] = a @ weights: the first `panels` panels of each part, part after part.

        The copy takes as many depth blocks as it has room for. With few rows that is all of them, and then the weights
        of a tile are read in the order in which they lie in memory.
        """
        begin()
        depth, parts = words(matrices.depth), matrices.parts
        part_elements = matrices.tile_elements // parts
        block_elements = (max(rows, 1) + row_step - 1) // row_step * row_step * ROW_STRIDE
        chunk = scratch.rows.size // block_elements * DEPTH_BLOCK
        for chunk_at in range(0, depth, chunk):
            end = min(chunk_at + chunk, depth)
            for first in range(chunk_at, end, DEPTH_BLOCK):
                copy_at = (first - chunk_at) // DEPTH_BLOCK * block_elements
                copy_rows(scratch.rows, copy_at, a, rows, matrices.depth, first, min(DEPTH_BLOCK, end - first))
            for part in range(parts):
                for panel in range(panels):
                    panel_at = tile_index * matrices.tile_elements + part * part_elements + panel * depth * width
                    column = part * (stride // parts) + panel * width
                    for first in range(chunk_at, end, DEPTH_BLOCK):
                        copy_at = (first - chunk_at) // DEPTH_BLOCK * block_elements
                        for group in range(0, rows, group_rows):
                            micro_kernel(
                                scratch.rows, copy_at + group * ROW_STRIDE, min(group_rows, rows - group),
                                matrices.weights, panel_at + first * width, min(DEPTH_BLOCK, end - first),
                                scratch.sums, group * stride + column, stride, first == 0,
                            )  # fmt: skip
        end_of_it()

    return multiply


_depth_itself, _nothing = jit(lambda depth: depth), jit(lambda: None)
_flush, _keep = jit(lambda: flush_denormals()), jit(lambda: keep_denormals())
_configure, _release = jit(lambda: amx.configure_tiles()), jit(lambda: amx.release_tiles())
_pair_words = jit(pair_words)


def _make_ways():
    """By the class of the weights: the instruction where the target has it, else what gives the same bits."""
    fma = _Way(_depth_itself, _copy_rows, fma_kernel, MICRO_ROWS, 1, _nothing, _nothing)
    pairs = fma._replace(words=_pair_words, copy_rows=_copy_pairs, micro_kernel=pair_kernel)
    tiles = pairs._replace(micro_kernel=tile_kernel, begin=_flush, end=_keep)
    if amx.BY_AMX:
        tiles = pairs._replace(micro_kernel=amx.amx_kernel, group_rows=amx.BLOCK_ROWS, row_step=ROW_STEP)
        tiles = tiles._replace(begin=_configure, end=_release)
    if not by_instruction("pairs"):
        pairs = pairs._replace(begin=_flush, end=_keep)
    return {Panels: fma, PairPanels: pairs, TilePanels: tiles}


MULTIPLY = {form: _make_multiply(way) for form, way in _make_ways().items()}


@jit
def _add_bias(sums, at, bias, bias_at, columns):
    for c in range(columns):
        store(sums, at + c, load(sums, at + c) + load(bias, bias_at + c))


@jit
def _store_row(out, out_at, sums, at, columns):
    for c in range(columns):
        store(out, out_at + c, load(sums, at + c))


@jit
def _store_gated_row(out, out_at, sums, gate_at, up_at, columns):
    for c in range(columns):
        store(out, out_at + c, load(sums, gate_at + c) * load(sums, up_at + c))


@jit
def _keep_row(kept, r, matrices, first, sums, at, part_columns, columns):
    kept_at = _room_row(kept, r) * matrices.parts * matrices.columns + first
    for part in range(matrices.parts):
        _store_row(kept.array, kept_at + part * matrices.columns, sums, at + part * part_columns, columns)


@jit
def _store_result(out, r, stride, first, sums, at, part_columns, columns, parts):
    room = out.array if _is_local(out) else array_at(_room_address(out, r), out.array.size, out.array)
    out_at = _room_row(out, r) * stride + first
    if parts == 2:
        _store_gated_row(room, out_at, sums, at, at + part_columns, columns)
    else:
        _store_row(room, out_at, sums, at, columns)


@overload(stub.tile_gemm, target="cpu", jit_options=PART_OPTIONS)
def _tile_gemm(out, kept, a, rows, matrices, expert, n, form, scratch):
    accumulator = np.float64 if scratch.types[0].dtype == types.float64 else np.float32
    width, multiply = panel_width(np.dtype(accumulator)), MULTIPLY[matrices.instance_class]

    def meaning(out, kept, a, rows, matrices, expert, n, form, scratch):
        parts, tile_n, sums = matrices.parts, matrices.tile_n, scratch.sums
        part_columns = (tile_n + width - 1) // width * width
        stride = parts * part_columns
        first = n * tile_n
        columns = min(tile_n, matrices.columns - first)
        panels = (columns + width - 1) // width
        tile_index = expert * ((matrices.columns + tile_n - 1) // tile_n) + n
        multiply(a, rows, matrices, tile_index, panels, width, stride, scratch)
        for r in range(rows):
            at = r * stride
            for part in range(parts):
                bias_at = (tile_index * parts + part) * tile_n
                _add_bias(sums, at + part * part_columns, matrices.bias, bias_at, columns)
            if kept.array.size > 0:
                _keep_row(kept, r, matrices, first, sums, at, part_columns, columns)
            if form.shape == PLAIN:
                activate(sums, at, columns, form.activation)
            else:
                activate_bound(sums, at, at + part_columns, columns, form)
            _store_result(out, r, matrices.columns, first, sums, at, part_columns, columns, parts)

    return meaning
