"""Where a benchmark's tokens and results lie: in this process, or on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import MoEConfig

from ..device.storage import storage_dtype


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

        self._cupy, self._dtype = cupy, config.numpy_dtype

    def to_device(self, array: np.ndarray) -> Any:
        return self._cupy.asarray(array.view(np.int16) if self._dtype.name == "bfloat16" else array)

    def to_host(self, array: Any) -> np.ndarray:
        bits = self._cupy.asnumpy(array).view(storage_dtype(self._dtype))
        return bits.view(self._dtype)


def make_memory(backend: str, config: MoEConfig) -> HostArrays | GpuArrays:
    return GpuArrays(config) if backend == "cuda" else HostArrays()
