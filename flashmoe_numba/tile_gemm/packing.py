"""`panels.fill_panels`, compiled: of each row a cache line at a time.

NumPy goes through all rows of a panel for each element of the depth. Elements of 16 bits go in pairs: two columns by
two of the depth are two words that are read, and two that are written.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..device.compilation import compile_for, jit
from ..device.cpu import get, put
from .panels import fill_panels

LINE = 16  # of the depth at a time: a cache line of words


@jit(entry=True)
def _fill(rows, at, target, num_panels, depth, width):
    """Panels of `width` rows each, the first of which begins at `at`."""
    for panel in range(num_panels):
        first, panel_at = at + panel * width * depth, panel * width * depth
        for near in range(0, depth, LINE):
            far = min(near + LINE, depth)
            for column in range(width):
                for d in range(near, far):
                    put(target, panel_at + d * width + column, get(rows, first + column * depth + d))


@jit(entry=True)
def _fill_by_pairs(rows, at, target, num_panels, depth, width):
    """The same of elements of 16 bits, where `depth`, `width` and `at` count words of two."""
    low, high, half = np.uint32(0xFFFF), np.uint32(0xFFFF0000), np.uint32(16)
    for panel in range(num_panels):
        first, panel_at = at + 2 * panel * width * depth, 2 * panel * width * depth
        for near in range(0, depth, LINE):
            far = min(near + LINE, depth)
            for column in range(width):
                row_at, column_at = first + 2 * column * depth, panel_at + column
                for d in range(near, far):
                    even, odd = get(rows, row_at + d), get(rows, row_at + depth + d)
                    put(target, column_at + 2 * d * width, np.uint32((even & low) | (odd << half)))
                    put(target, column_at + (2 * d + 1) * width, np.uint32((even >> half) | (odd & high)))


def fill_compiled(matrix: np.ndarray, panels: np.ndarray, tile_n: int, folder: Path | None = None) -> None:
    """`fill_panels`; left to NumPy are rows that are not contiguous, as where a checkpoint has them transposed, and
    panels that are not full.
    """
    (columns, depth), width = matrix.shape, panels.shape[-1]
    if not matrix.flags.c_contiguous or matrix.size == 0:
        fill_panels(matrix, panels, tile_n)
        return
    by_pairs = matrix.itemsize == 2 and depth % 2 == width % 2 == 0
    fill, per_word = (_fill_by_pairs, 2) if by_pairs else (_fill, 1)
    rows = matrix.reshape(-1).view(np.uint32 if by_pairs else matrix.dtype)
    for tile, of_tile in enumerate(panels):
        first, end = tile * tile_n, min((tile + 1) * tile_n, columns)
        full = (end - first) // width
        rest = first + full * width
        fill_panels(matrix[rest:end], of_tile[None, full:], tile_n)
        sizes = depth // per_word, width // per_word
        arguments = rows, first * sizes[0], of_tile.reshape(-1).view(rows.dtype), full, *sizes
        compile_for(fill, arguments, folder)(*arguments)
