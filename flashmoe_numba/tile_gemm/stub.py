"""The tile GEMM as a verb: one tile of `out = epilogue(a @ weights + bias)`, done by all lanes of a block.

It is the only numerics that differ by target. The body below is the interpreted meaning; cpu.py holds the compiled one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from reference.config import ACTIVATIONS
from reference.experts import activation as apply_activation

from ..device import vocabulary as verbs
from .panels import panels_per_tile

IDENTITY, RELU, GELU, SILU = (ACTIVATIONS.index(name) for name in ("identity", "relu", "gelu", "silu"))
INTERPRETED_PANEL_WIDTH = 4


class Scratch(NamedTuple):
    """A block's working memory, of the accumulator's type: `rows` for converted rows, `sums` for a tile of sums."""

    rows: np.ndarray
    sums: np.ndarray


def tile_gemm(out, out_at, out_stride, a, a_at, a_stride, rows, depth, weights, weights_at, columns,
              bias, bias_at, tile_n, activation, gated, scratch):  # fmt: skip
    """Store `[rows, columns]` of act(a @ gate + b0) * (a @ up + b1), or of act(a @ weights + b0) when not gated.

    Args:
        out, out_at, out_stride: element array, first element and row stride of the result.
        a, a_at, a_stride: the same for the rows to multiply, `[rows, depth]`.
        weights, weights_at: packed column tile (panels.py); its gate panels come before its up panels.
        columns: real columns of this tile, at most `tile_n`.
        bias, bias_at: `[parts, tile_n]` in the accumulator's type.
        activation: index into ACTIVATIONS.
        scratch: the block's `Scratch`.
    """
    width = INTERPRETED_PANEL_WIDTH
    parts = 2 if gated else 1
    panels = panels_per_tile(tile_n, tile_n, width)
    tile = weights[weights_at : weights_at + parts * panels * depth * width]
    tile = as_floats(tile, bias.dtype).reshape(parts, panels, depth, width).transpose(0, 2, 1, 3)
    tile = tile.reshape(parts, depth, panels * width)[:, :, :columns]
    added = bias[bias_at : bias_at + parts * tile_n].reshape(parts, tile_n)[:, :columns]
    for r in range(verbs.lane(), rows, verbs.lanes()):
        row = as_floats(a[a_at + r * a_stride : a_at + r * a_stride + depth], bias.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            sums = np.einsum("k,pkc->pc", row, tile) + added
            value = apply_activation(ACTIVATIONS[activation], sums[0]) * (sums[1] if gated else 1)
        for c in range(columns):
            verbs.store(out, out_at + r * out_stride + c, bias.dtype.type(value[c]))


def as_floats(array: np.ndarray, accumulator: np.dtype) -> np.ndarray:
    """Elements, perhaps stored as 16-bit patterns, in the accumulator's type."""
    if array.dtype == np.uint16:
        return array.view(np.float16).astype(accumulator)
    if array.dtype == np.int16:
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array
