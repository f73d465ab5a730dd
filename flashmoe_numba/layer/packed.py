"""Weights in the kernel's order, apart from the layer that packed them: what the layers of one model differ in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from reference import MoEConfig, Weights

from ..errors import FlashMoEError
from ..heap.packing import unpack
from ..heap.rank import Rank
from ..heap.sums import Sums
from ..kernel.state import Experts
from ..processes.ownership import Owned


class PackedWeights(Owned):
    """Router and experts of a layer's ranks in this process.

    When the layer is closed they remain, for `unpack`; what its calls had beside them goes.

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
        self._rank_indices, self._memory = [rank.rank_idx for rank in ranks], ranks[0].packing.memory
        shards = self._shards(weights)
        pairs = list(zip(ranks, shards, strict=True))
        self.of_ranks = of_ranks or [rank.packing.pack(of_rank) for rank, of_rank in pairs]
        self.transposed = [
            rank.packing.transpose(of_rank, experts)
            for (rank, of_rank), experts in zip(pairs, self.of_ranks, strict=True)
            if rank.save is not None
        ]
        self.outlines = [outline(of_rank) for of_rank in shards]
        self.sums = [Sums() for _ in shards]

    def load(self, weights: Weights) -> None:
        """Fill this with other weights, where it is, while its layer is open. No call may be under way.

        Raises:
            FlashMoEError: the layer is closed.
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        if not self._ranks:
            raise FlashMoEError("the layer that packed these weights is closed: they can be unpacked, but not loaded")
        pairs = list(zip(self._ranks, self._shards(weights), strict=True))
        for (rank, of_rank), experts in zip(pairs, self.of_ranks, strict=True):
            rank.packing.pack(of_rank, experts)
        for (rank, of_rank), experts, transposed in zip(pairs, self.of_ranks, self.transposed, strict=False):
            rank.packing.transpose(of_rank, experts, transposed)
        self.version += 1

    def unpack(self, weights: Weights) -> None:
        """Fill the matrices of `weights`, views of any strides, with those that were packed; biases are left alone.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        for of_rank, experts in zip(self._shards(weights), self.of_ranks, strict=True):
            unpack(self._memory, experts, of_rank)

    def let_go(self) -> None:
        """The layer is closed: there are no more calls."""
        self.transposed, self.sums = [], []

    def fits(self, ranks: Sequence[Rank]) -> bool:
        """Are they of the layer that has these ranks?"""
        return ranks is self._ranks

    def _shards(self, weights: Weights) -> list[Weights]:
        """Of each rank here."""
        if not isinstance(weights, Weights):
            raise TypeError(f"weights must be Weights, got {type(weights).__name__}")
        weights.check(self._config)
        return [weights.shard(rank_idx, self._config.num_ranks) for rank_idx in self._rank_indices]


def outline(weights: Weights) -> Weights:
    """Arrays of the same shapes and types, without memory of their own."""
    arrays = {name: a for name, a in vars(weights).items() if isinstance(a, np.ndarray)}
    outlines: dict[str, Any] = {name: np.broadcast_to(a.dtype.type(0), a.shape) for name, a in arrays.items()}
    return replace(weights, **outlines)
