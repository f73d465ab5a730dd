"""Weights packed once into the order in which the tile GEMM reads them.

A matrix `[out, in]` is cut into column tiles of `tile_n` outputs (they become columns of the product), a tile into
panels of `width` outputs, and a panel is stored as `[in, width]`. A gated expert's tile holds its gate panels, then its
up panels. Panels that are not full are padded with zeros; rows of a product do not see the padding.
"""

from __future__ import annotations

import numpy as np


def num_tiles(num_columns: int, tile_n: int) -> int:
    return -(-num_columns // tile_n)


def panels_per_tile(num_columns: int, tile_n: int, width: int) -> int:
    """Panels of one matrix in one column tile; all tiles have as many as the widest one."""
    return -(-min(num_columns, tile_n) // width)


def packed_elements(num_columns: int, depth: int, tile_n: int, width: int, parts: int) -> int:
    """Elements of one expert's packed matrices: `parts` is 2 for gate and up together, else 1."""
    return num_tiles(num_columns, tile_n) * parts * panels_per_tile(num_columns, tile_n, width) * depth * width


def pack(matrices: list[np.ndarray], tile_n: int, width: int, out: np.ndarray) -> None:
    """Pack one expert's matrices `[out, in]`, each of the same shape, into the 1-D array `out`."""
    columns, depth = matrices[0].shape
    panels = panels_per_tile(columns, tile_n, width)
    view = out.reshape(num_tiles(columns, tile_n), len(matrices), panels, depth, width)
    view[...] = 0
    for part, matrix in enumerate(matrices):
        for first in range(0, columns, tile_n):
            for panel in range(panels):
                rows = matrix[first + panel * width : min(first + tile_n, columns)][:width]
                view[first // tile_n, part, panel, :, : len(rows)] = rows.T
