"""Weights in the kernel's order, apart from the layer that packed them: what the layers of one model differ in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reference import MoEConfig, Weights

from ..heap.rank import Rank
from ..heap.sums import Sums
from ..kernel.state import Experts
from ..processes.ownership import Owned


class PackedWeights(Owned):
    """Router and experts of a layer's ranks in this process.

    Attributes:
        of_ranks: of each rank, as its kernel multiplies by them.
        transposed: likewise in a backward; none, where there is none.
        outlines: of each rank's weights, their arrays without what is in them.
        sums: of each, memory for their gradients.
        version: how often other weights were loaded into this.
    """

    def __init__(
        self, config: MoEConfig, ranks: Sequence[Rank], weights: Weights, of_ranks: Sequence[Experts] | None = None
    ) -> None:
        """Pack weights of all ranks.

        Args:
            of_ranks: those that each rank has packed already.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        self._config, self._ranks, self.version = config, ranks, 0
        shards = _shards(config, ranks, weights)
        self.of_ranks = of_ranks or [rank.packing.pack(of_rank) for rank, of_rank in shards]
        self.transposed = [
            rank.packing.transpose(of_rank, experts)
            for (rank, of_rank), experts in zip(shards, self.of_ranks, strict=True)
            if rank.save is not None
        ]
        self.outlines = [outline(of_rank) for _, of_rank in shards]
        self.sums = [Sums() for _ in shards]

    def load(self, weights: Weights) -> None:
        """Fill this with other weights, where it is. No call may be under way.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        shards = _shards(self._config, self._ranks, weights)
        for (rank, of_rank), experts in zip(shards, self.of_ranks, strict=True):
            rank.packing.pack(of_rank, experts)
        for (rank, of_rank), experts, transposed in zip(shards, self.of_ranks, self.transposed, strict=False):
            rank.packing.transpose(of_rank, experts, transposed)
        self.version += 1

    def unpack(self, weights: Weights) -> None:
        """Fill the matrices of `weights`, views of any strides, with those that were packed; biases are left alone.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        for (rank, of_rank), experts in zip(_shards(self._config, self._ranks, weights), self.of_ranks, strict=True):
            rank.packing.unpack(experts, of_rank)

    def fits(self, ranks: Sequence[Rank]) -> bool:
        """Are they of the layer that has these ranks?"""
        return ranks is self._ranks


def _shards(config: MoEConfig, ranks: Sequence[Rank], weights: Weights) -> list[tuple[Rank, Weights]]:
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be Weights, got {type(weights).__name__}")
    weights.check(config)
    return [(rank, weights.shard(rank.rank_idx, config.num_ranks)) for rank in ranks]


def outline(weights: Weights) -> Weights:
    """Arrays of the same shapes and types, without memory of their own."""
    arrays = {name: a for name, a in vars(weights).items() if isinstance(a, np.ndarray)}
    outlines: dict[str, Any] = {name: np.broadcast_to(a.dtype.type(0), a.shape) for name, a in arrays.items()}
    return replace(weights, **outlines)
