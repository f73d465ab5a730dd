"""From sums to results: bias, activation, gating, rounding."""

from __future__ import annotations

from flashmoe_numba.device import block_sync, jit, lane, lanes, load, store
from flashmoe_numba.tile_gemm.activations import BY_INDEX
from flashmoe_numba.tile_gemm.matrices import SUMS_STRIDE
from flashmoe_numba.tile_gemm.stub import tile_sums


def _choices(kinds):
    """activate(x, activation): by the one of these kinds that it is, or x itself."""
    if not kinds:
        return jit(lambda x, activation: x)
    (index, verb), *others = kinds
    rest = _choices(others)
    return jit(lambda x, activation: verb(x) if activation == index else rest(x, activation))


activate = _choices(BY_INDEX)


@jit
def multiply_tile(out, out_row, a, a_row, rows, matrices, expert, n, activation, scratch):
    """`stub.tile_gemm` for `Matrices`."""
    first = n * matrices.tile_n
    columns = min(matrices.tile_n, matrices.columns - first)
    for group in range(0, rows, matrices.group_rows):
        here = min(matrices.group_rows, rows - group)
        tile_sums(a, a_row + group, here, matrices, expert, first, columns, scratch)
        block_sync()
        finish(out, out_row + group, here, matrices, expert, first, columns, activation, scratch.sums)
        block_sync()


@jit
def finish(out, out_row, rows, matrices, expert, first, columns, activation, sums):
    """Lanes side by side take columns side by side, and several rows if there are more lanes than columns."""
    across = min(lanes(), matrices.tile_n)
    down = lanes() // across
    bias_at = expert * matrices.parts * matrices.columns + first
    for r in range(lane() // across, rows if lane() < across * down else 0, down):
        for c in range(lane() % across, columns, across):
            value = activate(load(sums, r * SUMS_STRIDE + c) + load(matrices.bias, bias_at + c), activation)
            if matrices.parts == 2:
                up = load(sums, r * SUMS_STRIDE + matrices.tile_n + c)
                value = value * (up + load(matrices.bias, bias_at + matrices.columns + c))
            store(out, (out_row + r) * matrices.columns + first + c, value)
