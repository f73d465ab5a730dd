"""Weights in 4 bits with a scale for each 32 of a row, as gpt-oss is published: MXFP4.

Elements are E2M1, a sign bit, two of exponent and one of mantissa; two in a byte, the first in its low half. A scale is
a power of two, E8M0: 2 ** (byte - 127), and NaN for 255. All that the products take is exact in bfloat16, but for
scales at the ends of the range. (OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3, 5.4.1 and 6.)
"""

from __future__ import annotations

import numpy as np

from reference.arrays import Array

BLOCKS, SCALES = "_blocks", "_scales"  # how the two tensors of one array of weights end
SCALE_TYPES = ("U8", "F8_E8M0")
BLOCK = 32
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)
NAN_SCALE = 255


def dequantise(blocks: Array, scales: Array) -> Array:
    """The weights, `[..., rows, columns]`, in float32.

    Args:
        blocks: `[..., rows, columns / 32, 16]`, bytes of two elements each.
        scales: `[..., rows, columns / 32]`, bytes.
    """
    elements = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1).reshape(*scales.shape, BLOCK)
    exponents = scales.astype(np.int32) - 127
    with np.errstate(over="ignore"):  # 6 * 2**127 is infinite in float32, and so is 255's before it is NaN
        weights: Array = np.ldexp(elements, exponents[..., None])
    weights[scales == NAN_SCALE] = np.nan
    return weights.reshape(*scales.shape[:-1], -1)
