"""What plain BLAS makes of the same work: a loop over the same expert GEMMs, and nothing but the GEMMs.

For each expert all rows that were routed to it are one matrix, which is kinder to BLAS than packets of each source.
Operands are in the accumulator's type and results go to arrays made beforehand. No gate, no activation, no moving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reference import MoEConfig, Weights


class Yardstick:
    """The GEMMs of some experts.

    Args:
        weights: these experts, kept as they are if they are of the operands' type.
        rows_per_expert: rows of each of them.
        arrays: the module that multiplies, NumPy or CuPy.
        dtype: of the operands.
    """

    def __init__(
        self, config: MoEConfig, weights: Weights, rows_per_expert: Sequence[int], arrays: Any = np, dtype: Any = None
    ) -> None:
        dtype = config.accumulator if dtype is None else dtype

        def operands(matrices: np.ndarray) -> Any:
            return arrays.asarray(matrices.astype(dtype, copy=False)).swapaxes(1, 2)

        self._arrays = arrays
        self._ups, self._down = [operands(matrices) for matrices, _ in weights.ups], operands(weights.down_proj)
        self._rows = [int(rows) for rows in rows_per_expert]
        most = max(self._rows, default=0)
        x = np.random.default_rng(0).standard_normal((most, config.hidden))
        self._x = arrays.asarray(x.astype(dtype))
        self._products = arrays.empty((len(self._ups), most, config.ffn), dtype)
        self._y = arrays.empty((most, config.hidden), dtype)

    def run(self, note_progress: Callable[[], None]) -> int:
        """Nanoseconds of one pass over all experts."""
        start = time.perf_counter_ns()
        for expert, rows in enumerate(self._rows):
            x, products, y = self._x[:rows], self._products[:, :rows], self._y[:rows]
            for matrices, product in zip(self._ups, products, strict=True):
                self._arrays.matmul(x, matrices[expert], out=product)
            self._arrays.matmul(products[-1], self._down[expert], out=y)
            note_progress()
        if self._arrays is not np:
            self._arrays.cuda.Device().synchronize()
        return time.perf_counter_ns() - start


def make_yardstick(backend: str, config: MoEConfig, weights: Weights, rows_per_expert: Sequence[int]) -> Yardstick:
    """On the device where the layer runs; on a GPU in the elements' type, with float16 for bfloat16."""
    if backend != "cuda":
        return Yardstick(config, weights, rows_per_expert)
    import cupy

    dtype = np.dtype(np.float16) if config.dtype == "bfloat16" else config.numpy_dtype
    return Yardstick(config, weights, rows_per_expert, cupy, dtype)
