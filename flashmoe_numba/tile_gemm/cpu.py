"""The tile GEMM on CPUs: batch-invariant, at BLAS speed.

Every element of a product is one chain of fused multiply-adds in the order of the depth index, whatever the tile's
height, the row's place in it or the column tile. So a row's bits do not depend on how tokens fall into tiles and ranks.
(A BLAS chooses its reduction order by the shape of the call.)

The loops are the classic ones: the rows are copied (and converted to the accumulator's type), as many depth blocks of
them as there is room for, and for each panel of weights and each depth block a register-blocked micro-kernel runs over
all groups of rows while that part of the panel stays in the first-level cache. Partial sums go to memory between depth
blocks, which rounds nothing. A group of fewer rows has a micro-kernel of its height, so that a product of few rows
takes as long as reading its weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

from ..device.compilation import jit
from ..device.cpu import bfloat_to_float, element_pointer, half_to_float
from ..device.vocabulary import array_at, load, store
from . import rows as of_rows
from . import stub
from .cpu_activations import activate
from .cpu_forms import activate_bound
from .forms import PLAIN

# What Numba compiles for: the host, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name a lesser machine.
_features = set(cpu_target.target_context.codegen().magic_tuple()[2].split(","))
VECTOR_BYTES = 64 if "+avx512f" in _features else 32 if "+avx2" in _features else 16
MICRO_ROWS = {64: 12, 32: 6, 16: 6}[VECTOR_BYTES]
MICRO_VECTORS = 2
FUSED = "+fma" in _features or "aarch64" in binding.get_process_triple()
DEPTH_BLOCK = 256
ROW_STRIDE = DEPTH_BLOCK + 16  # a power of two would put all rows of a group into one cache set


def panel_width(accumulator: np.dtype) -> int:
    """Columns of a weight panel for float32 or float64 sums."""
    return MICRO_VECTORS * VECTOR_BYTES // np.dtype(accumulator).itemsize


def _multiply_add(builder, a, b, c):
    """a * b + c, fused where the host can; without it LLVM would call a slow library routine for each lane."""
    if not FUSED:
        return builder.fadd(builder.fmul(a, b), c)
    suffix = "f32" if isinstance(c.type.element, ir.FloatType) else "f64"
    name = f"llvm.fma.v{c.type.count}{suffix}"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(c.type, [c.type] * 3), name
    )
    return builder.call(function, [a, b, c])


def _load_vector(builder, pointer, offset, vector, item_bytes):
    address = builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())
    return builder.load(address, align=item_bytes)


def _weight_vector(builder, pointer, offset, dtype, vector):
    """Weights as a vector of the accumulator's type; 16-bit ones are converted on the way into registers."""
    if dtype not in (types.uint16, types.int16):
        return _load_vector(builder, pointer, offset, vector, dtype.bitwidth // 8)
    bits = _load_vector(builder, pointer, offset, ir.VectorType(ir.IntType(16), vector.count), 2)
    return half_to_float(builder, bits) if dtype == types.uint16 else bfloat_to_float(builder, bits)


def _broadcast(builder, pointer, offset, vector):
    value = builder.load(builder.gep(pointer, [offset]))
    undefined = ir.Constant(vector, ir.Undefined)
    single = builder.insert_element(undefined, value, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(single, undefined, zeros)


class _Operands(NamedTuple):
    """What a micro-kernel reads and writes, as LLVM values: pointers to its first elements, and sizes."""

    rows: ir.Value
    weights: ir.Value
    weight_type: types.Type
    depth: ir.Value
    sums: ir.Value
    sums_stride: ir.Value
    first: ir.Value  # not 0: sums begin at zero
    vector: ir.VectorType
    item_bytes: int


def _next_sums(builder, o, height, k, sums):
    """All sums after the products of depth index k."""
    count, word = o.vector.count, ir.IntType(64)
    panel_at = builder.mul(k, word(count * MICRO_VECTORS))
    b = [
        _weight_vector(builder, o.weights, builder.add(panel_at, word(v * count)), o.weight_type, o.vector)
        for v in range(MICRO_VECTORS)
    ]
    found = []
    for m in range(height):
        a = _broadcast(builder, o.rows, builder.add(k, word(m * ROW_STRIDE)), o.vector)
        found += [_multiply_add(builder, a, b[v], sums[m * MICRO_VECTORS + v]) for v in range(MICRO_VECTORS)]
    return found


def _emit_kernel(builder, o, height, end):
    """sums[height, panel] (+)= rows[height, depth] @ weights[depth, panel], all sums in registers; then to `end`."""
    word, count = ir.IntType(64), o.vector.count
    start = builder.block
    resume, loop, done = (builder.append_basic_block(f"{name}_{height}") for name in ("resume", "depth", "done"))
    builder.cbranch(builder.icmp_unsigned("!=", o.first, o.first.type(0)), loop, resume)

    builder.position_at_end(resume)
    cells = [(m, v) for m in range(height) for v in range(MICRO_VECTORS)]
    offsets = [builder.add(builder.mul(o.sums_stride, word(m)), word(v * count)) for m, v in cells]
    partial = [_load_vector(builder, o.sums, offset, o.vector, o.item_bytes) for offset in offsets]
    builder.branch(loop)

    builder.position_at_end(loop)
    zero = ir.Constant(o.vector, [o.vector.element(0.0)] * count)
    k = _phi(builder, word, {start: word(0), resume: word(0)})
    sums = [_phi(builder, o.vector, {start: zero, resume: value}) for value in partial]
    following = _next_sums(builder, o, height, k, sums)
    k_next = builder.add(k, word(1))
    for phi, value in zip([k, *sums], [k_next, *following], strict=True):
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("<", k_next, o.depth), loop, done)

    builder.position_at_end(done)
    for (m, v), value in zip(cells, following, strict=True):
        offset = builder.add(builder.mul(o.sums_stride, word(m)), word(v * count))
        address = builder.bitcast(builder.gep(o.sums, [offset]), o.vector.as_pointer())
        builder.store(value, address, align=o.item_bytes)
    builder.branch(end)


def _phi(builder, kind, values):
    phi = builder.phi(kind)
    for block, value in values.items():
        phi.add_incoming(value, block)
    return phi


@intrinsic
def _micro_kernel(typing, rows, rows_at, height, weights, weights_at, depth, sums, sums_at, sums_stride, first):
    """sums[height, panel] (+)= rows[height, depth] @ weights[depth, panel], by a loop for each height."""
    i64 = types.int64
    signature = types.void(rows, i64, i64, weights, i64, i64, sums, i64, i64, types.boolean)

    def codegen(context, builder, sig, args):
        item_bytes = sig.args[6].dtype.bitwidth // 8
        operands = _Operands(
            rows=element_pointer(context, builder, sig.args[0], args[0], args[1]),
            weights=element_pointer(context, builder, sig.args[3], args[3], args[4]),
            weight_type=sig.args[3].dtype,
            depth=args[5],
            sums=element_pointer(context, builder, sig.args[6], args[6], args[7]),
            sums_stride=args[8],
            first=args[9],
            vector=ir.VectorType(context.get_data_type(sig.args[6].dtype), VECTOR_BYTES // item_bytes),
            item_bytes=item_bytes,
        )
        end = builder.append_basic_block("end")
        switch = builder.switch(args[2], end)
        for height in range(1, MICRO_ROWS + 1):
            case = builder.append_basic_block(f"height_{height}")
            switch.add_case(height, case)
            builder.position_at_end(case)
            _emit_kernel(builder, operands, height, end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return signature, codegen


_row_of, _room_row, _room_address = map(jit, (of_rows.row_of, of_rows.room_row, of_rows.room_address))


@jit
def _copy_rows(copy, copy_at, a, rows, depth, first, columns):
    """Columns from `first` on of the rows to copy, `ROW_STRIDE` apart."""
    for r in range(rows):
        source = _row_of(a, r) * depth + first
        for k in range(columns):
            store(copy, copy_at + r * ROW_STRIDE + k, load(a.array, source + k))


@jit
def _multiply(a, rows, matrices, tile_index, panels, width, stride, scratch):
    """scratch.sums[rows, stride] = a @ weights: the first `panels` panels of each part, part after part.

    The copy takes as many depth blocks as it has room for. With few rows that is all of them, and then the weights of
    a tile are read in the order in which they lie in memory.
    """
    depth, parts = matrices.depth, matrices.parts
    part_elements = matrices.tile_elements // parts
    block_elements = rows * ROW_STRIDE
    chunk = scratch.rows.size // block_elements * DEPTH_BLOCK
    for chunk_at in range(0, depth, chunk):
        end = min(chunk_at + chunk, depth)
        for first in range(chunk_at, end, DEPTH_BLOCK):
            copy_at = (first - chunk_at) // DEPTH_BLOCK * block_elements
            _copy_rows(scratch.rows, copy_at, a, rows, depth, first, min(DEPTH_BLOCK, end - first))
        for part in range(parts):
            for panel in range(panels):
                panel_at = tile_index * matrices.tile_elements + part * part_elements + panel * depth * width
                column = part * (stride // parts) + panel * width
                for first in range(chunk_at, end, DEPTH_BLOCK):
                    copy_at = (first - chunk_at) // DEPTH_BLOCK * block_elements
                    for group in range(0, rows, MICRO_ROWS):
                        _micro_kernel(
                            scratch.rows, copy_at + group * ROW_STRIDE, min(MICRO_ROWS, rows - group),
                            matrices.weights, panel_at + first * width, min(DEPTH_BLOCK, end - first),
                            scratch.sums, group * stride + column, stride, first == 0,
                        )  # fmt: skip


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
def _store_result(out, r, stride, first, sums, at, part_columns, columns, parts):
    room = out.array if out.at < 0 else array_at(_room_address(out, r), out.array.size, out.array)
    out_at = _room_row(out, r) * stride + first
    if parts == 2:
        _store_gated_row(room, out_at, sums, at, at + part_columns, columns)
    else:
        _store_row(room, out_at, sums, at, columns)


@overload(stub.tile_gemm, target="cpu")
def _tile_gemm(out, a, rows, matrices, expert, n, form, scratch):
    accumulator = np.float64 if scratch.types[0].dtype == types.float64 else np.float32
    width = panel_width(np.dtype(accumulator))

    def meaning(out, a, rows, matrices, expert, n, form, scratch):
        parts, tile_n, sums = matrices.parts, matrices.tile_n, scratch.sums
        part_columns = (tile_n + width - 1) // width * width
        stride = parts * part_columns
        first = n * tile_n
        columns = min(tile_n, matrices.columns - first)
        panels = (columns + width - 1) // width
        tile_index = expert * ((matrices.columns + tile_n - 1) // tile_n) + n
        _multiply(a, rows, matrices, tile_index, panels, width, stride, scratch)
        for r in range(rows):
            at = r * stride
            for part in range(parts):
                bias_at = (tile_index * parts + part) * tile_n
                _add_bias(sums, at + part * part_columns, matrices.bias, bias_at, columns)
            if form.shape == PLAIN:
                activate(sums, at, columns, form.activation)
            else:
                activate_bound(sums, at, at + part_columns, columns, form)
            _store_result(out, r, matrices.columns, first, sums, at, part_columns, columns, parts)

    return meaning
