"""Weights packed once into the order in which the tile GEMM reads them.

A matrix `[out, in]` is cut into column tiles of `tile_n` outputs (they become columns of the product), a tile into
panels of `width` outputs, and a panel is stored as `[in, width]`. A gated expert's tile holds its gate panels, then its
up panels. Panels that are not full are padded with zeros; rows of a product do not see the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..device.storage import storage_dtype

Fill = Callable[[np.ndarray, np.ndarray, int], None]


class Panels(NamedTuple):
    """One kind of matrix of all experts of a rank, packed (panels.py), and its biases.

    A gated expert's gate and up projections are one such matrix of two `parts`.
    """

    weights: np.ndarray  # elements [experts, tiles, parts, panels, depth, width]
    bias: np.ndarray  # accumulator [experts, tiles, parts, tile_n]
    depth: int
    columns: int
    tile_n: int
    tile_elements: int  # packed weights of one column tile
    parts: int


def num_tiles(num_columns: int, tile_n: int) -> int:
    return -(-num_columns // tile_n)


def panels_per_tile(num_columns: int, tile_n: int, width: int) -> int:
    """Panels of one matrix in one column tile; all tiles have as many as the widest one."""
    return -(-min(num_columns, tile_n) // width)


def packed_elements(num_columns: int, depth: int, tile_n: int, width: int, parts: int) -> int:
    """Elements of one expert's packed matrices: `parts` is 2 for gate and up together, else 1."""
    return num_tiles(num_columns, tile_n) * parts * panels_per_tile(num_columns, tile_n, width) * depth * width


def pack(matrices: list[np.ndarray], tile_n: int, width: int, out: np.ndarray, fill: Fill | None = None) -> None:
    """Pack one expert's matrices `[out, in]`, each of the same shape, into the 1-D array `out`.

    Args:
        fill: what packs one of them; None: NumPy.
    """
    columns, depth = matrices[0].shape
    view = out.reshape(num_tiles(columns, tile_n), len(matrices), -1, depth, width)
    for part, matrix in enumerate(matrices):
        (fill or fill_panels)(matrix, view[:, part], tile_n)


def fill_panels(matrix: np.ndarray, panels: np.ndarray, tile_n: int) -> None:
    """Pack one matrix `[out, in]` into panels `[tiles, panels of a tile, in, width]`."""
    columns, width = len(matrix), panels.shape[-1]
    for tile, panel in np.ndindex(panels.shape[:2]):
        rows = matrix[tile * tile_n + panel * width : min((tile + 1) * tile_n, columns)][:width]
        panels[tile, panel, :, : len(rows)] = rows.T
        panels[tile, panel, :, len(rows) :] = 0


def pack_matrices(
    matrices: Sequence[np.ndarray],
    biases: Sequence[np.ndarray | None],
    tile_n: int,
    width: int,
    accumulator: np.dtype,
    into: Panels | None = None,
    fill: Fill | None = None,
) -> Panels:
    """`Panels` of stacked matrices `[experts, out, in]`, two of them for gate and up; the originals are not kept.

    Args:
        matrices: elements; 16-bit floats are packed as bit patterns.
        biases: `[experts, out]` for each of them, or None.
        tile_n: columns of a tile; fewer where a matrix has fewer.
        into: what this returned for others of these shapes and types, to be filled anew; None: take memory.
        fill: see `pack`.
    """
    experts, columns, depth = matrices[0].shape
    tile_n, parts = min(tile_n, columns), len(matrices)
    size = packed_elements(columns, depth, tile_n, width, parts)
    weights = np.empty((experts, size), storage_dtype(matrices[0].dtype))
    if into is not None:
        weights = into.weights.reshape(experts, size)
    for expert, target in enumerate(weights):
        pack([matrix[expert].view(weights.dtype) for matrix in matrices], tile_n, width, target, fill)
    tiles = num_tiles(columns, tile_n)
    bias = np.zeros((experts, tiles, parts, tile_n), accumulator)
    for part, given in enumerate(biases):
        if given is not None:
            padded = np.zeros((experts, tiles * tile_n), accumulator)
            padded[:, :columns] = given.astype(accumulator)
            bias[:, :, part] = padded.reshape(experts, tiles, tile_n)
    if into is not None:
        into.bias[:] = bias.reshape(-1)
        return into
    return Panels(weights.reshape(-1), bias.reshape(-1), depth, columns, tile_n, size // tiles, parts)


def unpack_matrices(panels: Panels, out: Sequence[np.ndarray], width: int) -> None:
    """Fill arrays `[experts, out, in]`, one for each part, with what was packed; they may have any strides."""
    experts, columns, depth = out[0].shape
    tile_n, tiles = panels.tile_n, num_tiles(columns, panels.tile_n)
    in_panels = panels.weights.reshape(experts, tiles, panels.parts, -1, depth, width)
    for part, target in enumerate(out):
        bits = target.view(panels.weights.dtype)
        for expert, tile in np.ndindex(experts, tiles):
            first, last = tile * tile_n, min((tile + 1) * tile_n, columns)
            rows = in_panels[expert, tile, part].transpose(0, 2, 1).reshape(-1, depth)
            bits[expert, first:last] = rows[: last - first]
