"""What a backward needs beside the tile GEMM, as verbs: the gradient of hidden rows, and sums of outer products.

The bodies below are the interpreted meanings, by NumPy; on CPUs they are in cpu_gradients.py, on GPUs in lanes/.
"""

from __future__ import annotations

import numpy as np

from reference.expert_gradients import slopes
from reference.experts import activate

from ..device import fibers
from ..device import vocabulary as verbs
from ..device.compilation import interpreted
from .forms import kind_of
from .matrices import Matrices
from .panels import num_tiles
from .rows import row_of
from .stub import as_floats, tile_of

IS_VERB = True  # places in the source are those of callers (device/fibers.py)
# Of one `weight_gradient`: copies of both sides then cost little beside the products, and stay in a core's cache.
GRADIENT_ROWS, GRADIENT_COLUMNS = 256, 256


def hidden_gradient(kept, out, active, dots, factors, parts, a, rows, matrices, expert, n, form, scratch):
    """Store a tile of the gradients of what an expert's activation was given.

    With dA a tile of a @ weights, `[rows, columns]`, i a row's index among those that are kept, f its factor and A what
    `form` makes of its products h that were kept:

        out[i]          f * dA * dA/dh for each part's h, elements `[rows, parts * columns]`
        active[i]       f * A, elements `[rows, columns]`
        dots[i, n]      the sum of dA * A over the columns of the tile, accumulator `[rows, tiles]`

    all in the accumulator's type until they are stored. A row whose factor is 0 has zeros in `out` and `active`.

    Args:
        kept: the `Rows` of these products: elements `[rows, parts * columns]`, as `tile_gemm` kept them.
        factors: accumulator, of the rows where they lie in `a.array`.
        parts: 2 of a gated expert, else 1.
        a, rows: the `Rows` to multiply, and how many: gradients of the expert's results.
        matrices, expert, n: the down projections, transposed, of which the bias is not added; see `tile_gemm`.
        form, scratch: as of the `tile_gemm` that kept.
    """
    if isinstance(matrices, Matrices):
        lanes = interpreted("flashmoe_numba.tile_gemm.lanes")
        lanes.derive_tile(kept, out, active, dots, factors, parts, a, rows, matrices, expert, n, form, scratch)
        return
    columns, depth, accumulator = matrices.columns, matrices.depth, matrices.bias.dtype
    tile, _ = tile_of(matrices, expert, n)
    first, width, kind = n * matrices.tile_n, tile.shape[2], kind_of(form, gated=parts == 2)
    for r in range((verbs.lane() + 1) % verbs.lanes(), rows, verbs.lanes()):
        fibers.preempt()
        at, i = row_of(a, r) * depth, row_of(kept, r)
        starts = [(i * parts + part) * columns + first for part in range(parts)]
        with np.errstate(over="ignore", invalid="ignore"):
            row = as_floats(a.array[at : at + depth], accumulator)
            gradient = np.einsum("k,kc->c", row, tile[0])
            products = [as_floats(kept.array[start : start + width], accumulator) for start in starts]
            hidden, factor = activate(products, kind), factors[row_of(a, r)]
            of_products = [factor * gradient * slope for slope in slopes(products, kind)]
            dots[i * num_tiles(columns, matrices.tile_n) + n] = (gradient * hidden).sum(dtype=accumulator)
            rows_out = [(out, start, values) for start, values in zip(starts, of_products, strict=True)]
            for array, start, values in [*rows_out, (active, i * columns + first, factor * hidden)]:
                for c, value in enumerate(values):
                    verbs.store(array, start + c, accumulator.type(value if factor != 0 else 0))


def weight_gradient(
    out, out_at, out_stride, left, left_stride, left_at, num_left,
    right, right_stride, right_at, num_right, runs, fresh, scratch,
):  # fmt: skip
    """Add left.T @ right over some rows: out[i, j] += sum of left[r, i] * right[r, j], a block of it.

    Each sum is one chain of multiply-adds that begins with what `out` holds, or with 0, in the order of the rows: its
    bits depend neither on the block, nor on where runs, or calls, end.

    Args:
        out, out_at, out_stride: accumulator; element (i, j) is `out[out_at + i * out_stride + j]`.
        left, left_stride, left_at: elements or accumulator; element (r, i) is `left[r * left_stride + left_at + i]`.
        num_left: at most GRADIENT_ROWS.
        right, right_stride, right_at: likewise.
        num_right: at most GRADIENT_COLUMNS.
        runs: the rows, as `Runs`.
        fresh: do sums begin with 0, whatever `out` holds? Then there is a row.
        scratch: the block's `Scratch`.
    """
    for i in range((verbs.lane() + 1) % verbs.lanes(), num_left, verbs.lanes()):
        fibers.preempt()
        at = out_at + i * out_stride
        sums = np.zeros(num_right, out.dtype) if fresh else np.array(out[at : at + num_right])
        with np.errstate(over="ignore", invalid="ignore"):
            for q in range(runs.number):
                run = runs.at + q * runs.step
                for r in range(runs.first[run], runs.first[run] + runs.rows[run]):
                    first = r * right_stride + right_at
                    row = as_floats(right[first : first + num_right], out.dtype)
                    sums += verbs.load(left, r * left_stride + left_at + i) * row
        for c in range(num_right):
            verbs.store(out, at + c, sums[c])
