"""`panels.fill_panels`, compiled: it reads and writes memory by whole cache lines, so that packing streams.

NumPy copies one element of each row at a time, at a fifth of the memory's speed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..device.compilation import compile_for, jit
from .panels import fill_panels

LINE = 16  # of the depth at a time: a cache line of float32


@jit(entry=True)
def _fill(matrix, panels, tile_n):
    columns, depth = matrix.shape
    tiles, per_tile, _, width = panels.shape
    for tile in range(tiles):
        end = min((tile + 1) * tile_n, columns)
        for panel in range(per_tile):
            first = tile * tile_n + panel * width
            for near in range(0, depth, LINE):
                far = min(near + LINE, depth)
                for column in range(width):
                    if first + column < end:
                        for d in range(near, far):
                            panels[tile, panel, d, column] = matrix[first + column, d]
                    else:
                        for d in range(near, far):
                            panels[tile, panel, d, column] = 0


def fill_compiled(matrix: np.ndarray, panels: np.ndarray, tile_n: int, folder: Path | None = None) -> None:
    """`fill_panels`; rows that are not contiguous, as where a checkpoint has them transposed, are left to NumPy."""
    if not matrix.flags.c_contiguous or matrix.size == 0:
        fill_panels(matrix, panels, tile_n)
        return
    compile_for(_fill, (matrix, panels, tile_n), folder)(matrix, panels, tile_n)
