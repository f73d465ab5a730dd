"""A backward call: what a forward kept, the gradients that come in, and those that go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reference.arrays import Array, check_array, check_floating

from ..heap.back import BackCall
from ..heap.kept import Kept
from ..heap.rank import Rank
from ..heap.tensors import as_array
from ..kernel.backward.arguments import BackwardArguments
from ..kernel.backward.state import WeightGradients
from .forward import check_tokens, names, per_rank
from .packed import PackedWeights
from .parts import Parts


@dataclass(frozen=True)
class Backward:
    """Checked; a rank returns (gradients of its tokens, of its weights of pairs, of its logits).

    Args:
        tokens: dy of each rank here.
        said: of each, gradients of logits by way of other losses, or None.
        kept, epoch, packed: what each kept, of which call, and of which weights.
        gradients: of each, arrays that sums go on in.
        fresh: does this call begin these sums, whatever there is where they lie?
    """

    tokens: Sequence[Any]
    said: Sequence[Array | None]
    kept: Sequence[Kept]
    epoch: int
    packed: PackedWeights
    gradients: Sequence[WeightGradients]
    fresh: bool

    def begin(self, position: int, rank: Rank, epoch: int, deadline_ns: int) -> tuple[Any, BackwardArguments]:
        call = BackCall(
            dy=self.tokens[position],
            said=self.said[position],
            kept=self.kept[position],
            forward=self.epoch,
            experts=self.packed.of_ranks[position],
            transposed=self.packed.transposed[position],
            gradients=self.gradients[position],
            fresh=self.fresh,
        )
        return rank.call_back(call, epoch, deadline_ns)


def check_gradients(
    parts: Parts, kept: Sequence[Kept], dy: Any, logits_gradient: Any
) -> tuple[list[Any], list[Array | None]]:
    """(dy, gradients of logits by way of other losses) of each rank here, for the calls that they kept.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    tokens = check_tokens(parts, dy, "dy")
    argument = "logits_gradient"
    said = [None] * len(tokens) if logits_gradient is None else per_rank(parts, argument, logits_gradient)
    for rank, of_rank, own in zip(parts.ranks, kept, tokens, strict=True):
        if len(own) != of_rank.num_tokens:
            rule = f"dy must have a row for each of the {of_rank.num_tokens} tokens that forward() had"
            raise ValueError(f"{rule} on rank {rank.rank_idx}, got {len(own)}")
    return tokens, [_check_said(parts, *each) for each in zip(names(parts, argument), kept, said, strict=True)]


def _check_said(parts: Parts, name: str, kept: Kept, gradient: Any) -> Array | None:
    if gradient is None:
        return None
    if kept.routed:
        raise ValueError(f"{name} must be None where topk_weights were given: there are no logits")
    shape = kept.num_tokens, parts.config.num_choices
    array = check_floating(name, check_array(name, as_array(name, gradient), shape))
    with np.errstate(over="ignore"):  # as the kernel's own sums overflow
        return np.ascontiguousarray(array, parts.config.accumulator)
