"""Weights in 8 bits with a scale for each block of a matrix, as DeepSeek-V3 and those after it are published.

A weight is its element times the scale of its block, in float32: blocks of 128 x 128, of which those at the lower and
right edges may be partial (DeepSeek-V3, https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md). The
scale is called `scale_inv` there, and is what elements are multiplied by. One scale may also serve a whole matrix.
"""

from __future__ import annotations

import numpy as np

from reference.arrays import Array

BLOCK = (128, 128)
TYPES = ("F8_E4M3", "F8_E5M2")
SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")


def scale_shape(shape: tuple[int, ...], block: tuple[int, int] = BLOCK) -> tuple[int, ...]:
    """Of the scales of weights `[..., rows, columns]`: one for each block, of each matrix."""
    *matrices, rows, columns = shape
    return (*matrices, -(-rows // block[0]), -(-columns // block[1]))


def dequantise(elements: Array, scales: Array, block: tuple[int, int] = BLOCK) -> Array:
    """The weights, in float32.

    Args:
        elements: `[..., rows, columns]`, in 8 bits.
        scales: `scale_shape` of that, or a single one.
    """
    weights = elements.astype(np.float32)
    scales = scales.astype(np.float32)
    if scales.size > 1:
        rows, columns = weights.shape[-2:]
        scales = scales.repeat(block[0], axis=-2)[..., :rows, :].repeat(block[1], axis=-1)[..., :columns]
    return np.multiply(weights, scales, out=weights)
