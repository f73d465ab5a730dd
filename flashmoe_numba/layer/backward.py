"""A backward call: what a forward kept, the gradients that come in, and those that go out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from reference import MoEConfig, Weights
from reference.arrays import Array, check_array, check_floating

from ..heap.kept import Kept
from ..heap.rank import Rank
from ..kernel.backward.arguments import BackwardArguments
from ..kernel.backward.state import WeightGradients
from ..processes.ownership import Owned
from .packed import PackedWeights


class SavedCall(Owned):
    """What a forward kept for its backward, in this process: `FlashMoE.forward` returns it, `backward` takes it once.

    Attributes:
        epoch: number of the call.
        num_tokens: of each rank here.
    """

    def __init__(self, ranks: Sequence[Rank], packed: PackedWeights, epoch: int, kept: list[Kept]) -> None:
        self._ranks, self.packed, self.epoch = ranks, packed, epoch
        self._version = packed.version
        self._kept: list[Kept] | None = kept
        self.num_tokens = [of_rank.num_tokens for of_rank in kept]

    @property
    def closed(self) -> bool:
        """Was it used, or closed?"""
        return self._kept is None

    def close(self) -> None:
        """Give the memory back without a backward. All ranks of a layer must make the same backwards, or none."""
        self._kept = None

    def peek(self, ranks: Sequence[Rank]) -> list[Kept]:
        """What each of these ranks kept.

        Raises:
            ValueError: it is another layer's, was used or closed, or its weights have changed since.
        """
        if ranks is not self._ranks:
            raise ValueError("saved must be what forward() of this layer returned, got that of another layer")
        if self._kept is None:
            raise ValueError(f"saved must not have been used before: call {self.epoch} had its backward, or was closed")
        if self.packed.version != self._version:
            rule = "saved must be of the weights that there are"
            raise ValueError(f"{rule}: those of call {self.epoch} were loaded anew since, so gradients would be of both")
        return self._kept


@dataclass(frozen=True, eq=False)
class Gradients:
    """What `FlashMoE.backward` returns.

    Without `comm` every field has one entry per rank (x: in the form of dy); with it, this rank's.

    Args:
        x: of the tokens, in their element type.
        topk_weights: `[num_tokens, num_topk]`, in the type of sums: of every pair's weight as the forward used it, 0 of
            a pair that added nothing.
        logits: `[num_tokens, num_choices]`, likewise, of the logits as the product with the router makes them, or as
            they were given; None where topk_weights were given.
        weights: of this rank's experts, and of the router and the shared expert by way of this rank's tokens: `Weights`
            whose arrays are in the type of sums. `FlashMoE.backward(..., into=gradients)` goes on with these sums.
    """

    x: Any
    topk_weights: Any
    logits: Any
    weights: Any
    arrays: Sequence[WeightGradients] = ()
    owner: Any = None


@dataclass(frozen=True)
class Backward:
    """Checked; a rank returns (gradients of its tokens, of its weights of pairs, of its logits).

    Args:
        tokens: dy of each rank here.
        said: of each, gradients of logits by way of other losses, or None.
        saved: what the ranks kept, and of which call.
        gradients: arrays that sums go on in.
    """

    tokens: Sequence[Any]
    said: Sequence[Array | None]
    kept: Sequence[Kept]
    epoch: int
    packed: PackedWeights
    gradients: Sequence[WeightGradients]

    def begin(self, position: int, rank: Rank, epoch: int, deadline_ns: int) -> tuple[Any, BackwardArguments]:
        return rank.call_back(
            self.tokens[position], self.said[position], self.kept[position], self.epoch, epoch, deadline_ns,
            self.packed.of_ranks[position], self.packed.transposed[position], self.gradients[position],
        )  # fmt: skip


def check_said(config: MoEConfig, num_tokens: int, gradient: Any, routed: bool) -> Array | None:
    """The gradient of one rank's logits by way of other losses, in the kernel's type.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    if gradient is None:
        return None
    if routed:
        raise ValueError("logits_gradient must be None where topk_weights were given: there are no logits")
    check_floating("logits_gradient", check_array("logits_gradient", gradient, (num_tokens, config.num_choices)))
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(gradient, config.accumulator)


def as_weights(arrays: WeightGradients, weights: Weights, config: MoEConfig, to_host: Any) -> Weights:
    """The same as views in the shapes that `Weights` has.

    Args:
        weights: what these are gradients of, for which arrays there are and where the experts begin.
    """
    c, here = config, weights.num_experts
    a = WeightGradients(*(to_host(array) for array in arrays))
    names = ["gate", "up"] if c.expert_kind.gated else ["up"]
    found: dict[str, Any] = {"router": a.router.reshape(c.num_choices, c.hidden)}
    for prefix, up, bias, down, down_bias, ffn, lead, parts in (
        ("", a.up, a.up_bias, a.down, a.down_bias, c.ffn, (here,), c.expert_kind.num_ups),
        ("shared_", a.shared_up, a.shared_up_bias, a.shared_down, a.shared_down_bias, c.shared_ffn, (), c.shared_kind.num_ups),
    ):
        if not up.size:
            continue
        ups = up.reshape(*lead, parts, ffn, c.hidden)
        for part, name in enumerate(names):
            found[f"{prefix}{name}_proj"] = ups[..., part, :, :]
            if bias.size and getattr(weights, f"{prefix}{name}_bias") is not None:
                found[f"{prefix}{name}_bias"] = bias.reshape(*lead, parts, ffn)[..., part, :]
        found[f"{prefix}down_proj"] = down.reshape(*lead, c.hidden, ffn)
        if down_bias.size:
            found[f"{prefix}down_bias"] = down_bias.reshape(*lead, c.hidden)
    for name, array in (("router_bias", a.logit_bias), ("expert_scale", a.expert_scale), ("shared_gate_weight", a.shared_gate)):
        if array.size:
            found[name] = array
    if "up_proj" not in found:
        found |= {"up_proj": np.zeros((0, c.ffn, c.hidden)), "down_proj": np.zeros((0, c.hidden, c.ffn))}
    return Weights(**found, first_expert=weights.first_expert, num_zero=c.num_zero)
