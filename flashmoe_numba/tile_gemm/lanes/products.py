"""Sums of products by multiply-adds of single lanes: for any number type and any device.

A pass makes PASS_ROWS by PASS_COLUMNS sums, CELLS by CELLS of them in the registers of each of LANES lanes; operands
are staged in shared memory, a chunk of the depth at a time. A block of fewer lanes makes several passes over them.
Where there are no more columns than lanes side by side, as of a router's few experts, a lane makes one column's sums.
"""

from __future__ import annotations

from flashmoe_numba.device import block_sync, jit, lane, lanes, load, local_array, store
from flashmoe_numba.tile_gemm import rows as of_rows
from flashmoe_numba.tile_gemm.matrices import (
    CELLS,
    CHUNK,
    LANES,
    LANES_ACROSS,
    PASS_COLUMNS,
    PASS_ROWS,
    STAGE_STRIDE,
    SUMS_STRIDE,
)

row_of = jit(of_rows.row_of)


@jit
def sum_products(a, first_row, rows, matrices, expert, first, columns, scratch):
    """`stub.tile_sums` for at most PASS_ROWS rows."""
    weights_at = (expert * matrices.columns + first) * matrices.depth
    for part in range(matrices.parts):
        weights = matrices.first if part == 0 else matrices.second
        for column in range(0, columns, PASS_COLUMNS):
            here = min(PASS_COLUMNS, columns - column)
            sums_at = part * matrices.tile_n + column
            for skip in range(0, LANES, lanes()):
                if here <= LANES_ACROSS:
                    narrow_pass(
                        a, first_row, rows, weights, weights_at + column * matrices.depth, here, matrices.depth,
                        scratch.rows, scratch.sums, sums_at, skip + lane(),
                    )  # fmt: skip
                else:
                    wide_pass(
                        a, first_row, rows, weights, weights_at + column * matrices.depth, here, matrices.depth,
                        scratch.rows, scratch.sums, sums_at, skip + lane(),
                    )  # fmt: skip


def _pass_of(cells_across):
    """A pass in which lanes make so many columns' sums each; it is compiled in, so that sums stay in registers."""

    @jit
    def sum_pass(a, first_row, rows, weights, weights_at, columns, depth, staged, sums, sums_at, virtual_lane):
        """The sums of one lane: rows and columns CELLS apart from those of its neighbours."""
        cells = local_array(sums)
        row, column = virtual_lane // LANES_ACROSS, virtual_lane % LANES_ACROSS
        for chunk in range(0, depth, CHUNK):
            length = min(CHUNK, depth - chunk)
            block_sync()
            stage_rows(staged, a, first_row, rows, depth, chunk, length)
            stage(staged, PASS_ROWS, cells_across * LANES_ACROSS, weights, weights_at + chunk, columns, depth, length)
            block_sync()
            for k in range(length):
                for i in range(CELLS):
                    x = load(staged, (row + i * (PASS_ROWS // CELLS)) * STAGE_STRIDE + k)
                    for j in range(cells_across):
                        w = load(staged, (PASS_ROWS + column + j * LANES_ACROSS) * STAGE_STRIDE + k)
                        cells[i * CELLS + j] += x * w
        for i in range(CELLS):
            for j in range(cells_across):
                r, c = row + i * (PASS_ROWS // CELLS), column + j * LANES_ACROSS
                if r < rows and c < columns:
                    store(sums, r * SUMS_STRIDE + sums_at + c, cells[i * CELLS + j])

    return sum_pass


narrow_pass, wide_pass = _pass_of(1), _pass_of(CELLS)


@jit
def stage_rows(staged, a, first_row, rows, depth, chunk, length):
    """Copy `length` elements of each row into `staged`; of rows that there are not, repeat the last."""
    for turn in range(PASS_ROWS * CHUNK // lanes()):  # the same number for all lanes, so that compilers make no rest
        i = turn * lanes() + lane()
        r, k = i // CHUNK, i % CHUNK
        if k < length:
            value = load(a.array, row_of(a, first_row + min(r, rows - 1)) * depth + chunk + k)
            store(staged, r * STAGE_STRIDE + k, value)


@jit
def stage(staged, first, most, source, source_at, rows, stride, length):
    """The same of columns of weights."""
    for turn in range(most * CHUNK // lanes()):  # the same number for all lanes, so that compilers make no rest
        i = turn * lanes() + lane()
        r, k = i // CHUNK, i % CHUNK
        if k < length:
            value = load(source, source_at + min(r, rows - 1) * stride + k)
            store(staged, (first + r) * STAGE_STRIDE + k, value)
