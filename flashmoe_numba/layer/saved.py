"""What a forward kept for its backward, as users hold it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reference.arrays import Array

from ..heap.kept import Kept
from ..heap.rank import Rank
from ..processes.ownership import Owned
from .packed import PackedWeights


class SavedCall(Owned):
    """What a forward kept for its backward, in this process: `FlashMoE.forward` returns it, `backward` takes it once.

    What is kept goes with the layer: when that is closed, so is this.

    Attributes:
        epoch: number of the call.
        num_tokens: of each rank here.
        num_bytes: kept by all ranks here; on a GPU all room that was taken for it.
    """

    def __init__(self, ranks: Sequence[Rank], packed: PackedWeights, epoch: int) -> None:
        """What these ranks kept of the call that they just made."""
        kept = [rank.kept for rank in ranks]
        self._ranks, self.packed, self.epoch = ranks, packed, epoch
        self.num_bytes = sum(rank.kept_bytes() for rank in ranks)
        self._version = packed.version
        self._kept: list[Kept] | None = kept
        self.num_tokens = [of_rank.num_tokens for of_rank in kept]

    @property
    def closed(self) -> bool:
        """Was it used, or closed?"""
        return self._kept is None

    @property
    def topk_idx(self) -> list[Array]:
        """`[num_tokens, num_topk]` of each rank here: a copy of the choices, -1 for none; on the host, once the call is
        done.
        """
        return self._of_tokens("topk_idx", lambda rank: rank.config.num_topk)

    @property
    def logits(self) -> list[Array]:
        """`[num_tokens, num_choices]` of each rank here, in the type of sums: a copy of the logits, as the product with
        the router made them, or as they were given; `[num_tokens, 0]` where topk_weights were.
        """
        return self._of_tokens("kept_logits", lambda rank: rank.config.num_choices)

    def _of_tokens(self, name: str, width: Callable[[Rank], int]) -> list[Array]:
        found = []
        for rank, of_rank in zip(self._ranks, self.peek(self._ranks), strict=True):
            rows, columns, array = of_rank.num_tokens, width(rank), of_rank.arrays.tokens[name]
            columns = 0 if name == "kept_logits" and of_rank.routed else columns
            copy = rank.to_host(array[: rows * columns])  # calls after its backward write there
            found.append(copy.reshape(rows, columns))
        return found

    def close(self) -> None:
        """Keep it no longer, without a backward: its memory is for the layer's next calls.

        All ranks must make the same backwards.
        """
        kept, self._kept = self._kept, None
        for rank, of_rank in zip(self._ranks, kept or [], strict=False):
            assert rank.keeping is not None
            rank.keeping.give_back(of_rank)

    def let_go(self) -> None:
        """The layer is closed: there are no next calls."""
        self._kept = None

    def peek(self, ranks: Sequence[Rank]) -> list[Kept]:
        """What each of these ranks kept.

        Raises:
            ValueError: it is another layer's, was used or closed, or its weights have changed since.
        """
        if ranks is not self._ranks:
            raise ValueError("saved must be what forward() of this layer returned, got that of another layer")
        if self._kept is None:
            why = f"call {self.epoch} had its backward, or was closed, or its layer was"
            raise ValueError(f"saved must not have been used before: {why}")
        if self.packed.version != self._version:
            rule = "saved must be of the weights that there are"
            raise ValueError(
                f"{rule}: those of call {self.epoch} were loaded anew since, so gradients would be of both"
            )
        return self._kept
