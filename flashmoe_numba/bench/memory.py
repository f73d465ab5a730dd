"""Where a benchmark's tokens and results lie: in this process, or on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import MoEConfig
from reference.arrays import Array


class HostArrays:
    """NumPy arrays as they are."""

    def to_device(self, array: np.ndarray) -> np.ndarray:
        return array

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array


class GpuArrays:
    """CuPy arrays; bfloat16, which not every CuPy has, as bit patterns."""

    def __init__(self, config: MoEConfig) -> None:
        import cupy

        self._cupy, self._format = cupy, config.format

    def to_device(self, array: np.ndarray) -> Any:
        return self._cupy.asarray(array.view(self._format.exchanged))

    def to_host(self, array: Any) -> np.ndarray:
        """Elements, or sums, which have a type of their own."""
        copy: Array = self._cupy.asnumpy(array)
        return copy.view(self._format.dtype) if copy.dtype == self._format.exchanged else copy


def make_memory(backend: str, config: MoEConfig) -> HostArrays | GpuArrays:
    return GpuArrays(config) if backend == "cuda" else HostArrays()
