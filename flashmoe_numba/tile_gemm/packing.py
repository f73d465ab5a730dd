"""`panels.fill_panels`, compiled: of each row a cache line at a time.

NumPy goes through all rows of a panel for each element of the depth.
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
            full = max(0, min(width, end - first))
            rows, target = matrix[first : first + full], panels[tile, panel]
            for near in range(0, depth, LINE):
                for column in range(full):
                    for d in range(near, min(near + LINE, depth)):
                        target[d, column] = rows[column, d]
            target[:, full:] = 0


def fill_compiled(matrix: np.ndarray, panels: np.ndarray, tile_n: int, folder: Path | None = None) -> None:
    """`fill_panels`; rows that are not contiguous, as where a checkpoint has them transposed, are left to NumPy."""
    if not matrix.flags.c_contiguous or matrix.size == 0:
        fill_panels(matrix, panels, tile_n)
        return
    compile_for(_fill, (matrix, panels, tile_n), folder)(matrix, panels, tile_n)
