"""How elements are stored for kernel code: 16-bit floats as integers, in one dimension (vocabulary.py)."""

from __future__ import annotations

import numpy as np

from reference.formats import FORMATS


def storage_dtype(dtype: np.dtype) -> np.dtype:
    """The type under which kernel code sees elements of `dtype`."""
    known = FORMATS.get(dtype.name)
    return dtype if known is None else known.storage


def as_storage(array: np.ndarray) -> np.ndarray:
    """The array as kernel code sees it; the same memory."""
    return array.view(storage_dtype(array.dtype)).reshape(-1)
