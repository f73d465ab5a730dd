"""Arguments of a rank, made without a GPU: what kernels are compiled for is read off it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reference import Layout, MoEConfig, Weights
from reference.arrays import Array
from reference.layout import SAVES

from ..heap.host import HostMemory
from ..heap.rank import Rank
from ..kernel.backward.arguments import BackwardArguments
from ..kernel.grid import RankArguments
from ..tile_gemm import as_matrices
from ..tile_gemm.hopper import MAP_WORDS, NUM_MAPS, TmaMatrices, tma_matrices
from ..tile_gemm.matrices import Matrices
from .variants import Variant


def like_arguments(variant: Variant) -> RankArguments | BackwardArguments:
    """Those of a tiny layer's rank in this process's memory."""
    config = MoEConfig(num_ranks=1, num_tokens=1, hidden=8, ffn=8, num_experts=1, num_topk=1, dtype=variant.dtype)
    save = SAVES[0] if variant.backward else None
    segment, weights = np.zeros(Layout(config, save).num_bytes, np.uint8), Weights.random(config)
    rank = Rank(config, 0, weights, [segment], 1, _Likeness(variant), 0, save=save)
    if not variant.backward:
        return rank.first_arguments()
    return rank.first_backward(weights, rank.packing.transpose(weights, rank.experts))


def forward_of(arguments: RankArguments | BackwardArguments) -> RankArguments:
    """What a forward has of them."""
    return arguments.forward if isinstance(arguments, BackwardArguments) else arguments


class _Likeness(HostMemory):
    """A rank's memory, of which only the types matter."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant

    def pack(
        self,
        matrices: Sequence[Array],
        biases: Sequence[Array | None],
        tile_n: int,
        accumulator: np.dtype[Any],
        rows: Array | None,
        into: Any = None,
    ) -> Matrices | TmaMatrices:
        packed = as_matrices(matrices, biases, tile_n, accumulator, np.ascontiguousarray)
        if rows is None or not self._variant.tensor_cores:
            return packed
        return tma_matrices(packed, np.zeros(NUM_MAPS * MAP_WORDS, np.int64), tile_n)

    def make_wire(self, num_words: int, own: Array, layout: Layout, rank_idx: int) -> Array:
        return np.zeros(0, np.uint64 if self._variant.heap == "nvshmem" else np.int64)

    def unpack(self, packed: Any, out: Sequence[Array]) -> None:
        """Nothing to unpack: there are types only."""
