"""Number formats: how an element is held, as what kernels see it, and in what its sums are made.

One row per format, which the rest of the house asks: sizes, tolerances, memory and simulated bytes follow from it. What
a row cannot say is how kernels convert and multiply it (CONTRIBUTING.md lists the places).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class NumberFormat:
    """One format of elements.

    Args:
        name: as `MoEConfig.dtype` writes it.
        storage: under which kernel code sees elements: their own type, or bit patterns of their size.
        fraction_bits: bits of the significand that are stored.
        accumulator: name of the format of sums, logits and routing weights.
        mma_type: what matrix units multiply elements as, by the name of its rate in hardware files.
    """

    name: str
    storage: np.dtype[Any]
    fraction_bits: int
    accumulator: str
    mma_type: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's type of elements."""
        return element_dtype(self.name)

    @property
    def exchanged(self) -> np.dtype[Any]:
        """`dtype`, or `storage` where NumPy itself has no such type: libraries that know NumPy's alone take that."""
        return self.dtype if self.dtype.isbuiltin == 1 else self.storage

    @property
    def sums(self) -> NumberFormat:
        """The format of sums, logits and routing weights."""
        return FORMATS[self.accumulator]

    @property
    def num_bytes(self) -> int:
        """Bytes per element."""
        return self.storage.itemsize

    @property
    def unit_roundoff(self) -> float:
        """Largest relative error of one rounding to this format."""
        return 0.5 * 2.0**-self.fraction_bits


def element_dtype(name: str) -> np.dtype[Any]:
    """NumPy dtype of a format by its name; bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


_ROWS = (
    NumberFormat("float32", np.dtype(np.float32), 23, "float32", "float32"),
    NumberFormat("float64", np.dtype(np.float64), 52, "float64", "float64"),
    NumberFormat("float16", np.dtype(np.uint16), 10, "float32", "float16"),
    NumberFormat("bfloat16", np.dtype(np.int16), 7, "float32", "bfloat16"),
)
FORMATS = {row.name: row for row in _ROWS}
DTYPES = tuple(FORMATS)
