"""Sums of outer products by multiply-adds of single lanes, in the passes of products.py: what is the depth there are
rows here, and sums begin with what there is, or with 0.
"""

from __future__ import annotations

from flashmoe_numba.device import block_sync, jit, lane, lanes, load, local_array, store
from flashmoe_numba.tile_gemm.matrices import (
    CELLS,
    CHUNK,
    LANES,
    LANES_ACROSS,
    PASS_COLUMNS,
    PASS_ROWS,
    STAGE_STRIDE,
)


@jit
def add_outer_products(
    out, out_at, out_stride, left, left_stride, left_at, num_left,
    right, right_stride, right_at, num_right, runs, fresh, scratch,
):  # fmt: skip
    """`gradients.weight_gradient`."""
    for i in range(0, num_left, PASS_ROWS):
        for j in range(0, num_right, PASS_COLUMNS):
            for skip in range(0, LANES, lanes()):
                outer_pass(
                    out, out_at + i * out_stride + j, out_stride,
                    left, left_stride, left_at + i, min(PASS_ROWS, num_left - i),
                    right, right_stride, right_at + j, min(PASS_COLUMNS, num_right - j),
                    runs, fresh, scratch.rows, skip + lane(),
                )  # fmt: skip


@jit
def outer_pass(
    out, out_at, out_stride, left, left_stride, left_at, num_left,
    right, right_stride, right_at, num_right, runs, fresh, staged, virtual_lane,
):  # fmt: skip
    """The sums of one lane: rows and columns of `out` CELLS apart from those of its neighbours."""
    cells = local_array(out)
    row, column = virtual_lane // LANES_ACROSS, virtual_lane % LANES_ACROSS
    for i in range(CELLS):
        for j in range(CELLS):
            r, c = row + i * (PASS_ROWS // CELLS), column + j * LANES_ACROSS
            if not fresh and r < num_left and c < num_right:
                cells[i * CELLS + j] = out[out_at + r * out_stride + c]
    for q in range(runs.number):
        run = runs.at + q * runs.step
        for chunk in range(0, runs.rows[run], CHUNK):
            length = min(CHUNK, runs.rows[run] - chunk)
            first = runs.first[run] + chunk
            block_sync()
            stage_columns(staged, 0, PASS_ROWS, left, first * left_stride + left_at, num_left, left_stride, length)
            right_first = first * right_stride + right_at
            stage_columns(staged, PASS_ROWS, PASS_COLUMNS, right, right_first, num_right, right_stride, length)
            block_sync()
            for k in range(length):
                for i in range(CELLS):
                    x = load(staged, (row + i * (PASS_ROWS // CELLS)) * STAGE_STRIDE + k)
                    for j in range(CELLS):
                        w = load(staged, (PASS_ROWS + column + j * LANES_ACROSS) * STAGE_STRIDE + k)
                        cells[i * CELLS + j] += x * w
    for i in range(CELLS):
        for j in range(CELLS):
            r, c = row + i * (PASS_ROWS // CELLS), column + j * LANES_ACROSS
            if r < num_left and c < num_right:
                store(out, out_at + r * out_stride + c, cells[i * CELLS + j])
    block_sync()


@jit
def stage_columns(staged, first, most, source, source_at, columns, stride, length):
    """Put `most` columns of `length` rows into `staged`, a column's elements one after the other; of columns that there
    are not, repeat the last. Lanes side by side read columns side by side.
    """
    for turn in range(most * CHUNK // lanes()):  # the same number for all lanes, so that compilers make no rest
        i = turn * lanes() + lane()
        k, c = i // most, i % most
        if k < length:
            store(staged, (first + c) * STAGE_STRIDE + k, load(source, source_at + k * stride + min(c, columns - 1)))
