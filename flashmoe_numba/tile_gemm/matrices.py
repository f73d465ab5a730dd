"""Weights as frameworks keep them, `[experts, out, in]`, for targets whose blocks have many lanes (lanes/)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..device.storage import as_storage

CHUNK = 32  # of the depth, staged at a time
PASS_ROWS, PASS_COLUMNS = 32, 64  # sums that a block makes at a time, CELLS * CELLS in each of LANES lanes
CELLS = 4
LANES_ACROSS = PASS_COLUMNS // CELLS
LANES = PASS_ROWS // CELLS * LANES_ACROSS
STAGE_STRIDE = CHUNK + 1  # odd, so that lanes side by side read different banks of shared memory
MAX_TILE_COLUMNS = 128
SUMS_STRIDE = MAX_TILE_COLUMNS + 4  # likewise
STAGE_ELEMENTS, SUMS_ELEMENTS = (PASS_ROWS + PASS_COLUMNS) * STAGE_STRIDE, PASS_ROWS * SUMS_STRIDE  # of a `Scratch`


class Matrices(NamedTuple):
    """One kind of matrix of all experts of a rank, and its biases. A gated expert's gate and up are two parts."""

    first: np.ndarray  # elements [experts, columns, depth]: the gate of a gated expert, else all there is
    second: np.ndarray  # elements, likewise: the up projection of a gated expert, else nothing
    bias: np.ndarray  # accumulator [experts, parts, columns]
    depth: int
    columns: int
    tile_n: int
    parts: int
    group_rows: int  # rows that `tile_sums` takes at a time


def as_matrices(
    matrices: Sequence[Any],
    biases: Sequence[np.ndarray | None],
    tile_n: int,
    accumulator: np.dtype,
    to_device: Callable[[Any], Any],
) -> Matrices:
    """`Matrices` of stacked weights `[experts, out, in]`, two of them for gate and up.

    Args:
        biases: `[experts, out]` for each of them, or None.
        to_device: an array as kernel code can read it: the same if it can already.
    """
    experts, columns, depth = matrices[0].shape
    bias = np.zeros((experts, len(matrices), columns), accumulator)
    for part, given in enumerate(biases):
        if given is not None:
            bias[:, part] = given.astype(accumulator)
    elements = [to_device(as_storage(np.ascontiguousarray(matrix))) for matrix in matrices]
    second = elements[1] if len(elements) == 2 else elements[0][:0]
    return Matrices(
        first=elements[0],
        second=second,
        bias=to_device(as_storage(bias)),
        depth=depth,
        columns=columns,
        tile_n=min(tile_n, columns),
        parts=len(matrices),
        group_rows=PASS_ROWS,
    )
