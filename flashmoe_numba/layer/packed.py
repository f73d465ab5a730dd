"""Weights in the kernel's order, apart from the layer that packed them: what the layers of one model differ in."""

from __future__ import annotations

from collections.abc import Sequence

from reference import MoEConfig, Weights

from ..heap.rank import Rank
from ..kernel.state import Experts
from ..processes.ownership import Owned


class PackedWeights(Owned):
    """Router and experts of a layer's ranks in this process: at first those that the ranks were made with."""

    def __init__(self, config: MoEConfig, ranks: Sequence[Rank]) -> None:
        self._config, self._ranks = config, ranks
        self.of_ranks = [rank.experts for rank in ranks]

    @classmethod
    def pack(cls, config: MoEConfig, ranks: Sequence[Rank], weights: Weights) -> PackedWeights:
        """Others, as `FlashMoE.pack` returns them.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        packed = cls(config, ranks)
        packed.of_ranks = [rank.pack(of_rank) for rank, of_rank in packed._shards(weights)]
        return packed

    def load(self, weights: Weights) -> None:
        """Fill this with other weights, where it is. No call may be under way.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        for (rank, of_rank), experts in zip(self._shards(weights), self.of_ranks, strict=True):
            rank.pack(of_rank, experts)

    def unpack(self, weights: Weights) -> None:
        """Fill the matrices of `weights`, views of any strides, with those that were packed; biases are left alone.

        Raises:
            TypeError, ValueError: naming the array, what it is and what the config asks for.
        """
        for (rank, of_rank), experts in zip(self._shards(weights), self.of_ranks, strict=True):
            rank.unpack(experts, of_rank)

    def fits(self, ranks: Sequence[Rank]) -> Sequence[Experts] | None:
        """What each of these ranks is given in a call; None if they are another layer's."""
        return self.of_ranks if ranks is self._ranks else None

    def _shards(self, weights: Weights) -> list[tuple[Rank, Weights]]:
        if not isinstance(weights, Weights):
            raise TypeError(f"weights must be Weights, got {type(weights).__name__}")
        weights.check(self._config)
        return [(rank, weights.shard(rank.rank_idx, self._config.num_ranks)) for rank in self._ranks]
