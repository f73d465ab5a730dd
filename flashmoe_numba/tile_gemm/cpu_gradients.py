"""The backward's verbs on CPUs (gradients.py): registers the overloads.

A hidden gradient is the tile GEMM's product, and behind it loops over a row that are vectorised. A weight gradient is
a micro-kernel of `fma` for every element type: up to DEPTH_BLOCK rows are copied (and converted), those of the left
side as they are, which are columns to the micro-kernel, those of the right side as panels, and sums resume from where
they lie in memory.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload

from ..device.compilation import jit
from ..device.cpu import PART_OPTIONS
from ..device.vocabulary import load, store
from . import forms, gradients
from . import rows as of_rows
from .activations import IDENTITY
from .cpu import MULTIPLY, panel_width
from .cpu_activations import activate, activate_slope
from .forms import CLAMP, SOFTCAP
from .gradients import GRADIENT_COLUMNS, GRADIENT_ROWS
from .lanes.derivatives import bounded_slopes, soft_capped_slopes
from .micro_kernel import DEPTH_BLOCK, LINE_BYTES, MICRO_ROWS, drain_stores, outer_kernel, outer_stream

# In `scratch.sums`, behind the panels: of more room in `scratch.rows` the tile GEMM would make use, to no good.
STREAM_BYTES = 1 << 24
LEFT_AT = GRADIENT_COLUMNS * DEPTH_BLOCK  # the left side's copy
EDGE_AT = LEFT_AT + GRADIENT_ROWS * DEPTH_BLOCK  # sums of a panel that is not full
ROW_BUFFERS = 4  # behind the sums of a tile: as many columns each

_row_of, _at_most = jit(of_rows.row_of), jit(forms.at_most)


def gradient_elements(accumulator: np.dtype) -> int:
    """Sums that the `Scratch` of a `weight_gradient` has at least."""
    return EDGE_AT + MICRO_ROWS * panel_width(accumulator)


@overload(gradients.hidden_gradient, target="cpu", jit_options=PART_OPTIONS)
def _hidden_gradient(kept, out, active, dots, factors, parts, a, rows, matrices, expert, n, form, scratch):
    accumulator = np.float64 if scratch.types[0].dtype == types.float64 else np.float32
    width, multiply = panel_width(np.dtype(accumulator)), MULTIPLY[matrices.instance_class]

    def meaning(kept, out, active, dots, factors, parts, a, rows, matrices, expert, n, form, scratch):
        tile_n, sums = matrices.tile_n, scratch.sums
        stride = (tile_n + width - 1) // width * width
        first, tiles = n * tile_n, (matrices.columns + tile_n - 1) // tile_n
        columns = min(tile_n, matrices.columns - first)
        panels = (columns + width - 1) // width
        multiply(a, rows, matrices, expert * tiles + n, panels, width, stride, scratch)
        hidden_at = rows * stride
        for r in range(rows):
            i = _row_of(kept, r)
            at = i * parts * matrices.columns + first
            _load_row(sums, hidden_at, kept.array, at, columns)
            if parts == 2:
                _load_row(sums, hidden_at + stride, kept.array, at + matrices.columns, columns)
            else:
                _fill(sums, hidden_at + stride, columns, form.slope / form.slope)
            _derive(sums, hidden_at, stride, columns, form)
            dots[i * tiles + n] = _dot(sums, r * stride, hidden_at, columns)
            _store_row(
                out, at, active, i * matrices.columns + first, parts, matrices.columns, factors[_row_of(a, r)],
                sums, r * stride, hidden_at, stride, columns,
            )  # fmt: skip

    return meaning


@jit
def _load_row(sums, at, source, source_at, columns):
    for c in range(columns):
        store(sums, at + c, load(source, source_at + c))


@jit
def _fill(array, at, columns, value):
    for c in range(at, at + columns):
        store(array, c, value)


@jit
def _derive(sums, gate_at, stride, columns, form):
    """`lanes.derivatives.hidden_slopes` of a row, a loop for each step.

    In the buffers from `gate_at` on, `stride` apart: gate and up become the hidden element and its derivative by up;
    behind them come room for the activation, and the derivative by gate.
    """
    up_at, active_at, slope_at = gate_at + stride, gate_at + 2 * stride, gate_at + 3 * stride
    one = form.slope / form.slope
    if form.shape == SOFTCAP:
        for c in range(columns):
            gate, up = load(sums, gate_at + c), load(sums, up_at + c)
            hidden, gate_slope, up_slope = soft_capped_slopes(gate, up, form, one)
            store(sums, gate_at + c, hidden)
            store(sums, up_at + c, up_slope)
            store(sums, slope_at + c, gate_slope)
        return
    _limit_gate(sums, gate_at, active_at, columns, form)
    _load_row(sums, slope_at, sums, active_at, columns)
    activate(sums, active_at, columns, form.activation)
    if form.activation == IDENTITY:
        _fill(sums, slope_at, columns, one)
    else:
        activate_slope(sums, slope_at, columns, form.activation)
    for c in range(columns):
        gate, up = load(sums, gate_at + c), load(sums, up_at + c)
        active, slope = load(sums, active_at + c), load(sums, slope_at + c)
        hidden, gate_slope, up_slope = bounded_slopes(gate, up, active, slope, form, one)
        store(sums, gate_at + c, hidden)
        store(sums, up_at + c, up_slope)
        store(sums, slope_at + c, gate_slope)


@jit
def _limit_gate(sums, gate_at, to, columns, form):
    """What the activation is given."""
    for c in range(columns):
        gate = load(sums, gate_at + c)
        store(sums, to + c, (_at_most(gate, form.gate_limit) if form.shape == CLAMP else gate) * form.slope)


@jit
def _dot(sums, at, other, columns):
    """In the order of the columns."""
    total = load(sums, at) * load(sums, other)
    for c in range(1, columns):
        total += load(sums, at + c) * load(sums, other + c)
    return total


@jit
def _store_row(out, out_at, active, active_at, parts, part_columns, factor, sums, at, hidden_at, stride, columns):
    """The gradient in the sums times a factor and each derivative, and the hidden row times the factor."""
    if factor == 0:
        _fill(active, active_at, columns, factor)
        for part in range(parts):
            _fill(out, out_at + part * part_columns, columns, factor)
        return
    _scale(sums, at, columns, factor)
    _scale(sums, hidden_at, columns, factor)
    _load_row(active, active_at, sums, hidden_at, columns)
    _store_product(out, out_at, sums, at, hidden_at + 3 * stride, columns)
    if parts == 2:
        _store_product(out, out_at + part_columns, sums, at, hidden_at + stride, columns)


@jit
def _scale(sums, at, columns, factor):
    for c in range(at, at + columns):
        store(sums, c, load(sums, c) * factor)


@jit
def _store_product(out, out_at, sums, at, other, columns):
    for c in range(columns):
        store(out, out_at + c, load(sums, at + c) * load(sums, other + c))


@overload(gradients.weight_gradient, target="cpu", jit_options=PART_OPTIONS)
def _weight_gradient(
    out, out_at, out_stride, left, left_stride, left_at, num_left,
    right, right_stride, right_at, num_right, runs, fresh, scratch,
):  # fmt: skip
    width = panel_width(np.dtype(np.float64 if out.dtype == types.float64 else np.float32))

    def meaning(
        out, out_at, out_stride, left, left_stride, left_at, num_left,
        right, right_stride, right_at, num_right, runs, fresh, scratch,
    ):  # fmt: skip
        filled, first = 0, fresh
        streams = fresh and _can_stream(out, out_at, out_stride, width) and _num_rows(runs) <= DEPTH_BLOCK
        for q in range(runs.number):
            run = runs.at + q * runs.step
            row, end = runs.first[run], runs.first[run] + runs.rows[run]
            while row < end:
                rows = min(end - row, DEPTH_BLOCK - filled)
                left_first, right_first = row * left_stride + left_at, row * right_stride + right_at
                _copy_rows(
                    scratch.sums, LEFT_AT + filled * GRADIENT_ROWS, left, left_first, left_stride, rows, num_left
                )
                _copy_panels(scratch.sums, filled, width, right, right_first, right_stride, rows, num_right)
                row += rows
                filled += rows
                if filled == DEPTH_BLOCK:
                    _add_block(out, out_at, out_stride, num_left, num_right, filled, width, first, streams, scratch)
                    filled, first = 0, False
        if filled > 0:
            _add_block(out, out_at, out_stride, num_left, num_right, filled, width, first, streams, scratch)
        if streams:
            drain_stores()

    return meaning


@jit
def _can_stream(out, at, stride, width):
    """Panels are whole lines, of an array that no cache would hold until it is read."""
    starts = out.ctypes.data + at * out.itemsize, stride * out.itemsize, width * out.itemsize
    in_lines = starts[0] % LINE_BYTES == 0 and starts[1] % LINE_BYTES == 0 and starts[2] % LINE_BYTES == 0
    return in_lines and out.nbytes >= STREAM_BYTES


@jit
def _num_rows(runs):
    total = 0
    for q in range(runs.number):
        total += runs.rows[runs.at + q * runs.step]
    return total


@jit
def _copy_rows(copy, at, source, source_at, stride, rows, columns):
    """Rows of the copy are `GRADIENT_ROWS` apart."""
    for r in range(rows):
        _load_row(copy, at + r * GRADIENT_ROWS, source, source_at + r * stride, columns)


@jit
def _copy_panels(copy, filled, width, source, source_at, stride, rows, columns):
    """Rows become rows `filled` and on of panels of `width` columns; what is left of the last one stays."""
    for r in range(rows):
        for panel in range((columns + width - 1) // width):
            here = min(width, columns - panel * width)
            _load_row(
                copy, (panel * DEPTH_BLOCK + filled + r) * width, source, source_at + r * stride + panel * width, here
            )


@jit
def _add_block(out, out_at, out_stride, num_left, num_right, rows, width, first, streams, scratch):
    """The products of the copied rows, to 0 if they are the first; rows of `out` one after the other, as they are read
    from memory. Sums that nobody adds to are streamed: a store that is not has its line read first.
    """
    for group in range(0, num_left, MICRO_ROWS):
        height, left_at = min(MICRO_ROWS, num_left - group), LEFT_AT + group
        for panel in range((num_right + width - 1) // width):
            columns, panel_at = min(width, num_right - panel * width), panel * width * DEPTH_BLOCK
            at = out_at + group * out_stride + panel * width
            if columns < width:
                _copy_block(scratch.sums, EDGE_AT, width, out, at, out_stride, height, columns)
                outer_kernel(
                    scratch.sums, left_at, height, scratch.sums, panel_at, rows, scratch.sums, EDGE_AT, width, first
                )
                _copy_block(out, at, out_stride, scratch.sums, EDGE_AT, width, height, columns)
            elif streams and height == MICRO_ROWS:
                outer_stream(scratch.sums, left_at, height, scratch.sums, panel_at, rows, out, at, out_stride, first)
            else:
                outer_kernel(scratch.sums, left_at, height, scratch.sums, panel_at, rows, out, at, out_stride, first)


@jit
def _copy_block(target, target_at, target_stride, source, source_at, source_stride, rows, columns):
    for r in range(rows):
        _load_row(target, target_at + r * target_stride, source, source_at + r * source_stride, columns)
