"""Weights on a GPU, in the form of its kernel: matrices as they are, and where tensor cores multiply, maps for TMA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from reference.arrays import Array

from ..build.variants import Variant
from ..gpu.gpu import Gpu
from ..processes.ownership import Owned
from ..tile_gemm import as_matrices
from ..tile_gemm.hopper import DEPTH_BYTES, HALF_COLUMNS, ROWS, TmaMatrices, tma_matrices


class CudaWeights(Owned, ABC):
    """Those verbs of a memory (heap/protocols.py) that have to do with weights."""

    def __init__(self, gpu: Gpu, variant: Variant) -> None:
        self.gpu, self.variant = gpu, variant

    @abstractmethod
    def store(self, target: Any, values: np.ndarray) -> None:
        """Copy values from the host into an array, in the order of the call's stream."""

    def pack(
        self,
        matrices: Sequence[Any],
        biases: Sequence[np.ndarray | None],
        tile_n: int,
        accumulator: np.dtype,
        rows: Any,
        into: Any = None,
    ) -> Any:
        packed = as_matrices(matrices, biases, tile_n, accumulator, self.gpu.to_device)
        if into is not None:  # where it is: captured graphs have its addresses, and maps too
            with self.gpu.here:
                for old, new in zip(_arrays(into), _arrays(packed), strict=True):
                    old[...] = new
            return into
        if rows is None or not self.variant.tensor_cores:
            return packed
        return tma_matrices(packed, self._maps(packed, rows), tile_n)

    def unpack(self, packed: Any, out: Sequence[Array]) -> None:
        for array, target in zip(_arrays(packed), out, strict=False):
            target[...] = self.gpu.to_host(array).view(target.dtype).reshape(target.shape)

    def _maps(self, packed: Any, rows: Any) -> Any:
        """Maps of the weights, and of the rows that they multiply for each height of a tile (hopper.py)."""
        depth, columns, block = packed.depth, packed.columns, DEPTH_BYTES // packed.first.dtype.itemsize
        experts = packed.first.size // (depth * columns)
        second = packed.second if packed.parts == 2 else packed.first
        weights = [((depth, columns, experts), (block, HALF_COLUMNS, 1), array) for array in (packed.first, second)]
        data = b"".join(self.gpu.tensor_map(array, shape, box) for shape, box, array in weights)
        return self.gpu.to_device(np.concatenate([np.frombuffer(data, np.int64), self._row_maps(rows, depth)]))

    def _row_maps(self, rows: Any, depth: int) -> Array:
        """Maps of these rows for each height of a tile, and of a single row."""
        block, num_rows = DEPTH_BYTES // rows.dtype.itemsize, rows.size // depth
        boxes = [(block, height) for height in (*ROWS, 1)]
        data = b"".join(self.gpu.tensor_map(rows, (depth, num_rows), box) for box in boxes)
        return np.frombuffer(data, np.int64)

    def aim(self, matrices: Any, rows: Any) -> None:
        """Maps of the call's rows, for weights that multiply others in each call; a part of the call that began."""
        if isinstance(matrices, TmaMatrices) and rows.size > 0:
            maps = self._row_maps(rows, matrices.depth)
            self.store(matrices.maps[matrices.maps.size - maps.size :], maps)

    def beside(self, matrices: Any) -> Any:
        if not isinstance(matrices, TmaMatrices):
            return matrices
        with self.gpu.here:
            maps = self.gpu.cupy.empty(matrices.maps.size, np.int64)
            maps[...] = matrices.maps
            return matrices._replace(maps=maps)


def _arrays(packed: Any) -> tuple[Any, Any, Any]:
    return packed.first, packed.second, packed.bias
