"""The tile GEMM as a verb: one tile of `out = epilogue(a @ weights + bias)`, done by all lanes of a block.

With the verbs of gradients.py it is the only numerics that differ by target, and by the form of the weights: `Panels`
and its subclasses (cpu.py), `Matrices` (lanes/) and `TmaMatrices` (hopper.py), of which cuda.py registers the last two.
The body below is the interpreted meaning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reference.experts import activate

from ..device import fibers
from ..device import vocabulary as verbs
from ..device.compilation import interpreted
from .forms import Form, kind_of
from .matrices import Matrices
from .panels import num_tiles
from .rows import is_local, room_address, room_row, row_of

INTERPRETED_PANEL_WIDTH = 4
IS_VERB = True  # places in the source are those of callers (device/fibers.py)


class Scratch(NamedTuple):
    """A block's working memory, of the accumulator's type: `rows` for converted rows, `sums` for a tile of sums."""

    rows: np.ndarray
    sums: np.ndarray


def tile_gemm(out, kept, a, rows, matrices, expert, n, form, scratch):
    """Store a tile of act(a @ weights + b0); where there are two parts, of act(a @ gate + b0) * (a @ up + b1), or of
    what else `form` makes of these.

    Args:
        out: the `Rooms` of the results; the tile's columns are those of column tile n.
        kept: `Rooms` in `kept.array` itself, elements `[rows, parts * columns]`, for the products plus their biases,
            which `form` sees unrounded; nothing is kept where the array is empty (`nothing_kept`).
        a, rows: the `Rows` to multiply, and how many.
        matrices, expert, n: weights in one of these forms, and which column tile of which expert.
        form: the `Form` of the results.
        scratch: the block's `Scratch`.
    """
    multiply(verbs.array_at, out, kept, a, rows, matrices, expert, n, form, scratch)


def multiply(
    array_at: Any,
    out: Any,
    kept: Any,
    a: Any,
    rows: int,
    matrices: Any,
    expert: int,
    n: int,
    form: Form,
    scratch: Scratch,
) -> None:
    """The same, interpreted; the first verb is another one where memory is watched."""
    if isinstance(matrices, Matrices):
        lanes = interpreted("flashmoe_numba.tile_gemm.lanes")
        lanes.multiply_tile(out, kept, a, rows, matrices, expert, n, form, scratch)
        return
    depth, parts, accumulator = matrices.depth, matrices.parts, matrices.bias.dtype
    tile, added = tile_of(matrices, expert, n)
    first = n * matrices.tile_n
    kind = kind_of(form, gated=parts == 2)
    mine = (verbs.lane() + 1) % verbs.lanes()  # as on other targets, a row is made by any lane
    for r in range(mine, rows, verbs.lanes()):
        fibers.preempt()
        at = row_of(a, r) * depth
        row = as_floats(a.array[at : at + depth], accumulator)
        with np.errstate(over="ignore", invalid="ignore"):
            sums = np.einsum("k,pkc->pc", row, tile) + added
            value = activate(sums, kind)
        if kept.array.size > 0:
            kept_at = room_row(kept, r) * parts * matrices.columns + first
            for part, c in np.ndindex(sums.shape):
                verbs.store(kept.array, kept_at + part * matrices.columns + c, sums[part, c])
        room = out.array if is_local(out) else array_at(room_address(out, r), out.array.size, out.array)
        out_at = room_row(out, r) * matrices.columns + first
        for c in range(len(value)):
            verbs.store(room, out_at + c, accumulator.type(value[c]))


def tile_of(matrices: Any, expert: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights `[parts, depth, columns]` and the biases `[parts, columns]` of one tile of `Panels`, interpreted."""
    width, depth, parts, tile_n = INTERPRETED_PANEL_WIDTH, matrices.depth, matrices.parts, matrices.tile_n
    columns = min(tile_n, matrices.columns - n * tile_n)
    tile_index = expert * num_tiles(matrices.columns, tile_n) + n
    tile = matrices.weights[tile_index * matrices.tile_elements :][: matrices.tile_elements]
    tile = as_floats(tile, matrices.bias.dtype).reshape(parts, -1, depth, width).transpose(0, 2, 1, 3)
    added = matrices.bias[tile_index * parts * tile_n :][: parts * tile_n].reshape(parts, tile_n)
    return tile.reshape(parts, depth, -1)[:, :, :columns], added[:, :columns]


def tile_sums(a, first_row, rows, matrices, expert, first, columns, scratch):
    """Fill `scratch.sums` `[rows, SUMS_STRIDE]` with the products of some rows and one column tile of `Matrices`.

    Args:
        a, first_row, rows: `Rows`, which of the tile's comes first, and how many: at most `matrices.group_rows`.
        first, columns: of the tile; the columns of a second part come `tile_n` after those of the first.
    """
    interpreted("flashmoe_numba.tile_gemm.lanes").sum_products(
        a, first_row, rows, matrices, expert, first, columns, scratch
    )


def as_floats(array: np.ndarray, accumulator: np.dtype) -> np.ndarray:
    """Elements, perhaps stored as 16-bit patterns, in the accumulator's type."""
    if array.dtype == np.uint16:
        return array.view(np.float16).astype(accumulator)
    if array.dtype == np.int16:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array
