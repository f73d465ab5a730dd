"""What plain BLAS makes of the same work: a loop over the same expert GEMMs, and nothing but the GEMMs.

For each expert all rows that were routed to it are one matrix, which is kinder to BLAS than packets of each source.
Operands are in the accumulator's type and results go to arrays made beforehand. No gate, no activation, no moving.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from reference import MoEConfig, Weights


class Yardstick:
    """The GEMMs of some experts.

    Args:
        weights: these experts, kept as they are if they are in the accumulator's type.
        rows_per_expert: rows of each of them.
    """

    def __init__(self, config: MoEConfig, weights: Weights, rows_per_expert: Sequence[int]) -> None:
        def operands(matrices: np.ndarray) -> np.ndarray:
            return matrices.astype(config.accumulator, copy=False).swapaxes(1, 2)

        self._gate = None if weights.gate_proj is None else operands(weights.gate_proj)
        self._up, self._down = operands(weights.up_proj), operands(weights.down_proj)
        self._rows = [int(rows) for rows in rows_per_expert]
        most = max(self._rows, default=0)
        self._x = np.random.default_rng(0).standard_normal((most, config.hidden)).astype(config.accumulator)
        self._gates, self._hidden = np.empty((2, most, config.ffn), config.accumulator)
        self._y = np.empty((most, config.hidden), config.accumulator)

    def run(self, note_progress: Callable[[], None]) -> int:
        """Nanoseconds of one pass over all experts."""
        start = time.perf_counter_ns()
        for expert, rows in enumerate(self._rows):
            x, gates, hidden, y = (array[:rows] for array in (self._x, self._gates, self._hidden, self._y))
            if self._gate is not None:
                np.matmul(x, self._gate[expert], out=gates)
            np.matmul(x, self._up[expert], out=hidden)
            np.matmul(hidden, self._down[expert], out=y)
            note_progress()
        return time.perf_counter_ns() - start


def expert_flops(config: MoEConfig, num_rows: int) -> int:
    """Operations of `num_rows` rows in their experts' matrices, 2 per multiply-add."""
    return 2 * num_rows * config.hidden * config.ffn * (3 if config.gated else 2)
