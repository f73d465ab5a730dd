"""The tile GEMM on CPUs: batch-invariant, at BLAS speed.

Every element of a product is one chain of fused multiply-adds in the order of the depth index, whatever the tile's
height, the row's place in it or the column tile. So a row's bits do not depend on how tokens fall into tiles and ranks.
(A BLAS chooses its reduction order by the shape of the call.)

The loops are the classic ones: a depth block of the rows is copied (and converted to the accumulator's type), and for
each panel of weights a register-blocked micro-kernel runs over all groups of rows while the panel stays in the
first-level cache. Partial sums go to memory between depth blocks, which rounds nothing.
"""

from __future__ import annotations

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

from ..device.compilation import jit
from ..device.cpu import bfloat_to_float, element_pointer, half_to_float
from ..device.vocabulary import load, store
from . import stub
from .cpu_activations import activate

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


@intrinsic
def _micro_kernel(typing, rows, rows_at, weights, weights_at, depth, sums, sums_at, sums_stride, first):
    """sums[MICRO_ROWS, panel] (+)= rows[MICRO_ROWS, depth] @ weights[depth, panel], all sums in registers."""
    i64 = types.int64
    signature = types.void(rows, i64, weights, i64, i64, sums, i64, i64, types.boolean)

    def codegen(context, builder, sig, args):
        word = ir.IntType(64)
        rows_ptr = element_pointer(context, builder, sig.args[0], args[0], args[1])
        weights_ptr = element_pointer(context, builder, sig.args[2], args[2], args[3])
        sums_ptr = element_pointer(context, builder, sig.args[5], args[5], args[6])
        depth, stride, first = args[4], args[7], args[8]
        scalar = context.get_data_type(sig.args[5].dtype)
        item = sig.args[5].dtype.bitwidth // 8
        count = VECTOR_BYTES // item
        vector = ir.VectorType(scalar, count)
        cells = [(m, v) for m in range(MICRO_ROWS) for v in range(MICRO_VECTORS)]

        def cell_offset(m, v):
            return builder.add(builder.mul(stride, word(m)), word(v * count))

        start = builder.block
        resume, loop, done = (builder.append_basic_block(name) for name in ("resume", "depth", "done"))
        builder.cbranch(builder.icmp_unsigned("!=", first, first.type(0)), loop, resume)

        builder.position_at_end(resume)
        partial = [_load_vector(builder, sums_ptr, cell_offset(m, v), vector, item) for m, v in cells]
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(word)
        k.add_incoming(word(0), start)
        k.add_incoming(word(0), resume)
        sums_now = []
        for value in partial:
            phi = builder.phi(vector)
            phi.add_incoming(ir.Constant(vector, [scalar(0.0)] * count), start)
            phi.add_incoming(value, resume)
            sums_now.append(phi)
        panel_at = builder.mul(k, word(count * MICRO_VECTORS))
        b = [
            _weight_vector(builder, weights_ptr, builder.add(panel_at, word(v * count)), sig.args[2].dtype, vector)
            for v in range(MICRO_VECTORS)
        ]
        undefined = ir.Constant(vector, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), count), [0] * count)
        sums_next = []
        for m in range(MICRO_ROWS):
            value = builder.load(builder.gep(rows_ptr, [builder.add(k, word(m * ROW_STRIDE))]))
            single = builder.insert_element(undefined, value, ir.IntType(32)(0))
            a = builder.shuffle_vector(single, undefined, zeros)
            for v in range(MICRO_VECTORS):
                sums_next.append(_multiply_add(builder, a, b[v], sums_now[m * MICRO_VECTORS + v]))
        k_next = builder.add(k, word(1))
        k.add_incoming(k_next, loop)
        for phi, value in zip(sums_now, sums_next, strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", k_next, depth), loop, done)

        builder.position_at_end(done)
        for (m, v), value in zip(cells, sums_next, strict=True):
            address = builder.bitcast(builder.gep(sums_ptr, [cell_offset(m, v)]), vector.as_pointer())
            builder.store(value, address, align=item)
        return context.get_dummy_value()

    return signature, codegen


@jit
def _copy_rows(copy, a, a_at, a_stride, rows, depth):
    """Rows to copy, `ROW_STRIDE` apart; a last group that is not full repeats the last row."""
    for r in range((rows + MICRO_ROWS - 1) // MICRO_ROWS * MICRO_ROWS):
        source = a_at + min(r, rows - 1) * a_stride
        for k in range(depth):
            store(copy, r * ROW_STRIDE + k, load(a, source + k))


@jit
def _multiply(a, a_row, rows, matrices, tile_index, panels, width, stride, scratch):
    """scratch.sums[rows, stride] = a @ weights: the first `panels` panels of each part, part after part."""
    depth, parts = matrices.depth, matrices.parts
    part_elements = matrices.tile_elements // parts
    for first in range(0, depth, DEPTH_BLOCK):
        block = min(DEPTH_BLOCK, depth - first)
        _copy_rows(scratch.rows, a, a_row * depth + first, depth, rows, block)
        for part in range(parts):
            for panel in range(panels):
                panel_at = tile_index * matrices.tile_elements + part * part_elements + (panel * depth + first) * width
                column = part * (stride // parts) + panel * width
                for group in range(0, rows, MICRO_ROWS):
                    _micro_kernel(
                        scratch.rows, group * ROW_STRIDE, matrices.weights, panel_at, block,
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


@overload(stub.tile_gemm, target="cpu")
def _tile_gemm(out, out_row, a, a_row, rows, matrices, expert, n, activation, scratch):
    accumulator = np.float64 if scratch.types[0].dtype == types.float64 else np.float32
    width = panel_width(np.dtype(accumulator))

    def meaning(out, out_row, a, a_row, rows, matrices, expert, n, activation, scratch):
        parts, tile_n, sums = matrices.parts, matrices.tile_n, scratch.sums
        part_columns = (tile_n + width - 1) // width * width
        stride = parts * part_columns
        first = n * tile_n
        columns = min(tile_n, matrices.columns - first)
        panels = (columns + width - 1) // width
        tile_index = expert * ((matrices.columns + tile_n - 1) // tile_n) + n
        _multiply(a, a_row, rows, matrices, tile_index, panels, width, stride, scratch)
        for r in range(rows):
            at = r * stride
            out_at = (out_row + r) * matrices.columns + first
            for part in range(parts):
                bias_at = (tile_index * parts + part) * tile_n
                _add_bias(sums, at + part * part_columns, matrices.bias, bias_at, columns)
            activate(sums, at, columns, activation)
            if parts == 2:
                _store_gated_row(out, out_at, sums, at, at + part_columns, columns)
            else:
                _store_row(out, out_at, sums, at, columns)

    return meaning
