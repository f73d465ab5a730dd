"""Weights packed once into the order in which the tile GEMM reads them.

A matrix `[out, in]` is cut into column tiles of `tile_n` outputs (they become columns of the product), a tile into
panels of `width` outputs, and a panel is stored as `[in, width]`. A gated expert's tile holds its gate panels, then its
up panels. Panels that are not full are padded with zeros; rows of a product do not see the padding.

How CPUs multiply a panel (arithmetic.py) is its class: Numba compiles for types, and keeps code by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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


class PairPanels(Panels):
    """bfloat16 weights as words (int32) of two indices of the depth, the even one low, for arithmetic "pairs".

    A panel is `[words, width]`; `pair_words` says how many words the depth takes. What pads it is zeros.
    """

    __slots__ = ()


class TilePanels(PairPanels):
    """The same words for arithmetic "tiles"."""

    __slots__ = ()


TILE_WORDS = 16  # the depth that one instruction of a matrix unit takes


def pair_words(depth: int) -> int:
    """Words of a depth: whole steps of a matrix unit."""
    return (depth + 2 * TILE_WORDS - 1) // (2 * TILE_WORDS) * TILE_WORDS


def as_pairs(matrix: np.ndarray) -> np.ndarray:
    """Words `[..., pair_words(depth)]` of 16-bit patterns `[..., depth]`."""
    depth = matrix.shape[-1]
    padded = np.zeros((*matrix.shape[:-1], 2 * pair_words(depth)), np.dtype("<i2"))
    padded[..., :depth] = matrix
    return padded.view(np.dtype("<i4"))


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
    form: type[Panels] = Panels,
    into: Panels | None = None,
    fill: Fill | None = None,
    threads: int = 1,
) -> Panels:
    """`Panels` of stacked matrices `[experts, out, in]`, two of them for gate and up; the originals are not kept.

    Args:
        matrices: elements; 16-bit floats are packed as bit patterns.
        biases: `[experts, out]` for each of them, or None.
        tile_n: columns of a tile; fewer where a matrix has fewer.
        form: the class of the result; one of pairs takes bfloat16 only.
        into: what this returned for others of these shapes and types, to be filled anew; None: take memory.
        fill: see `pack`.
        threads: that share the experts.
    """
    experts, columns, depth = matrices[0].shape
    tile_n, parts = min(tile_n, columns), len(matrices)
    paired, storage = issubclass(form, PairPanels), storage_dtype(matrices[0].dtype)
    size = packed_elements(columns, pair_words(depth) if paired else depth, tile_n, width, parts)
    weights = np.empty((experts, size), np.int32 if paired else storage)
    if into is not None:
        weights = into.weights.reshape(experts, size)

    def pack_expert(expert: int) -> None:
        elements = [matrix[expert].view(storage) for matrix in matrices]
        pack([as_pairs(matrix) for matrix in elements] if paired else elements, tile_n, width, weights[expert], fill)

    for_all(pack_expert, experts, threads)
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
    return form(weights.reshape(-1), bias.reshape(-1), depth, columns, tile_n, size // tiles, parts)


def for_all(step: Callable[[int], None], count: int, threads: int) -> None:
    """`step` of 0 to `count - 1`, by as many threads."""
    if min(count, threads) <= 1:
        for i in range(count):
            step(i)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(step, range(count)):
            pass


def unpack_matrices(panels: Panels, out: Sequence[np.ndarray], width: int) -> None:
    """Fill arrays `[experts, out, in]`, one for each part, with what was packed; they may have any strides."""
    experts, columns, depth = out[0].shape
    tile_n, tiles = panels.tile_n, num_tiles(columns, panels.tile_n)
    words = pair_words(depth) if isinstance(panels, PairPanels) else depth
    in_panels = panels.weights.reshape(experts, tiles, panels.parts, -1, words, width)
    for part, target in enumerate(out):
        bits = target.view(storage_dtype(target.dtype))
        for expert, tile in np.ndindex(experts, tiles):
            first, last = tile * tile_n, min((tile + 1) * tile_n, columns)
            rows = np.ascontiguousarray(in_panels[expert, tile, part].transpose(0, 2, 1)).reshape(-1, words)
            bits[expert, first:last] = rows.view(bits.dtype)[: last - first, :depth]
