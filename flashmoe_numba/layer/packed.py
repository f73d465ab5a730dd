"""Weights in the kernel's order, apart from the layer that packed them: what the layers of one model differ in."""

from __future__ import annotations

from collections.abc import Sequence

from reference import MoEConfig, Weights

from ..heap.rank import Rank
from ..kernel.state import Experts
from ..processes.ownership import Owned


class PackedWeights(Owned):
    """Router and experts of a layer's ranks in this process."""

    def __init__(self, config: MoEConfig, ranks: Sequence[Rank], of_ranks: Sequence[Experts]) -> None:
        self._config, self._ranks, self.of_ranks = config, ranks, of_ranks

    @classmethod
    def pack(cls, config: MoEConfig, ranks: Sequence[Rank], weights: Weights) -> PackedWeights:
        """Weights of all ranks, as `FlashMoE.pack` returns them.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        return cls(config, ranks, [rank.packing.pack(of_rank) for rank, of_rank in _shards(config, ranks, weights)])

    def load(self, weights: Weights) -> None:
        """Fill this with other weights, where it is. No call may be under way.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        for (rank, of_rank), experts in zip(_shards(self._config, self._ranks, weights), self.of_ranks, strict=True):
            rank.packing.pack(of_rank, experts)

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
