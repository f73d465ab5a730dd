"""Gradients as users get them, and the arrays that a kernel adds them up in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from reference import ExpertKind, MoEConfig, Weights
from reference.arrays import Array

from ..heap.back import gradient_sizes, zero_gradients
from ..heap.protocols import Memory
from ..heap.tensors import like_given
from ..kernel.backward.state import WeightGradients
from .packed import PackedWeights
from .parts import Parts


@dataclass(frozen=True, eq=False)
class Gradients:
    """What `FlashMoE.backward` returns.

    Without `comm` every field has one entry per rank (x: in the form of dy); with it, this rank's. On a GPU all other
    arrays are CuPy's, those of `weights` too; they are filled in the order of the caller's stream.

    Args:
        x: of the tokens, in their element type.
        topk_weights: `[num_tokens, num_topk]`, in the type of sums: of every pair's weight as the forward used it, 0 of
            a pair that added nothing.
        logits: `[num_tokens, num_choices]`, likewise, of the logits as the product with the router makes them, or as
            they were given; None where topk_weights were given.
        weights: of this rank's experts, and of the router, the shared expert and the scale of a norm by way of this
            rank's tokens: `Weights` whose arrays are in the type of sums; without experts, where these are frozen. They
            are views of `arrays`: `FlashMoE.backward(..., into=gradients)` goes on with these sums where they are.
        arrays: the sums as the kernel has them.
    """

    x: Any
    topk_weights: Any
    logits: Any
    weights: Any
    arrays: Sequence[WeightGradients]


class CallSums(NamedTuple):
    """Where each rank here adds up the gradients of its weights in a call.

    Args:
        fresh: does the call begin these sums?
        used: of each rank, is there something of earlier sums, then?
    """

    arrays: Sequence[WeightGradients]
    fresh: bool
    used: Sequence[bool]

    def settle(self, parts: Parts, packed: PackedWeights) -> None:
        """After the call; where memory does not grow it is under way, and none comes back that would want it."""
        if not parts.backend.grows:
            return
        for sums, rank, arrays, used in zip(packed.sums, parts.ranks, self.arrays, self.used, strict=True):
            if self.fresh and arrays.up.size:
                sums.settle(arrays, used, rank.idle_experts())


def call_sums(parts: Parts, packed: PackedWeights, into: Gradients | None, experts: bool, router: bool) -> CallSums:
    """Those of an earlier call, or new ones.

    Raises:
        TypeError, ValueError: `into` is no gradients, or of other arrays than these are.
    """
    if into is None:
        sizes = [gradient_sizes(parts.config, outline, experts, router) for outline in packed.outlines]
        pairs = zip(packed.sums, sizes, strict=True)
        taken = [sums.take(parts.backend, of_rank, parts.config.accumulator) for sums, of_rank in pairs]
        return CallSums([arrays for arrays, _ in taken], True, [used for _, used in taken])
    if not isinstance(into, Gradients):
        raise TypeError(f"into must be what backward() returned, got {type(into).__name__}")
    wanted = _weights(parts, packed, _zeros(parts, packed, experts, router))
    found = into.weights if isinstance(into.weights, list) else [into.weights]
    if list(map(_outline, found)) != list(map(_outline, wanted)):
        raise ValueError("into must be gradients of the same arrays as this call's weights have, got those of others")
    whole = len(found) == len(into.arrays)
    if not (whole and all(map(_are_views, repeat(parts.backend), found, into.arrays))):
        raise ValueError("into must be what backward() returned, got a copy, whose weights are not where its sums are")
    if not all(_can_grow(weights, arrays) for weights, arrays in zip(found, into.arrays, strict=True)):
        raise ValueError("into must be gradients that can be written to, got some that are read-only")
    return CallSums(into.arrays, False, [False] * len(into.arrays))


def _are_views(memory: Memory, weights: Weights, arrays: WeightGradients) -> bool:
    pairs = (weights.router, arrays.router), (weights.down_proj, arrays.down)
    return all(memory.address(view) == memory.address(array) for view, array in pairs if array.size)


def _can_grow(weights: Weights, arrays: WeightGradients) -> bool:
    """No array of NumPy's is read-only; on GPUs none can be."""
    there = [array for array in (*vars(weights).values(), *arrays) if isinstance(array, np.ndarray)]
    return all(array.flags.writeable for array in there)


def _outline(weights: Weights) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    arrays = {name: array for name, array in vars(weights).items() if hasattr(array, "dtype")}
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def make_gradients(
    parts: Parts, dy: Any, packed: PackedWeights, arrays: Sequence[WeightGradients], found: Sequence[Any]
) -> Gradients:
    """Of what each rank here returned: (dx, gradients of weights of pairs, of logits)."""
    dxs, pairs, logits = map(list, zip(*found, strict=True))
    weights = _weights(parts, packed, arrays)
    if parts.all_here:
        return Gradients(like_given(dy, parts.backend.join(dy, dxs)), pairs, logits, weights, arrays)
    return Gradients(like_given(dy, dxs[0]), pairs[0], logits[0], weights[0], arrays)


def no_gradients(parts: Parts, packed: PackedWeights, experts: bool, router: bool) -> Gradients:
    """Of no call yet: weights alone."""
    arrays = _zeros(parts, packed, experts, router)
    weights = _weights(parts, packed, arrays)
    return Gradients(None, None, None, weights if parts.all_here else weights[0], arrays)


def _zeros(parts: Parts, packed: PackedWeights, experts: bool, router: bool) -> list[WeightGradients]:
    return [zero_gradients(parts.config, outline, parts.backend, experts, router) for outline in packed.outlines]


def _weights(parts: Parts, packed: PackedWeights, arrays: Sequence[WeightGradients]) -> list[Weights]:
    pairs = zip(arrays, packed.outlines, strict=True)
    return [as_weights(of_rank, outline, parts.config) for of_rank, outline in pairs]


def as_weights(arrays: WeightGradients, weights: Weights, config: MoEConfig) -> Weights:
    """Gradients as views in the shapes that `Weights` has.

    Args:
        weights: what they are gradients of, for which arrays there are and where the experts begin.
    """
    c, a = config, arrays
    found = {"router": a.router.reshape(-1, c.hidden)}
    num_experts = weights.num_experts if a.up.size else 0
    found |= _matrices(weights, "", (a.up, a.up_bias, a.down, a.down_bias), c.expert_kind, (num_experts,))
    if a.shared_up.size:
        shared = a.shared_up, a.shared_up_bias, a.shared_down, a.shared_down_bias
        found |= _matrices(weights, "shared_", shared, c.shared_kind, ())
    others = {"router_bias": a.logit_bias, "expert_scale": a.expert_scale, "shared_gate_weight": a.shared_gate}
    others |= {"result_scale": a.result_scale}
    found |= {name: array for name, array in others.items() if getattr(weights, name) is not None and array.size}
    return Weights(**found, first_expert=weights.first_expert, num_zero=c.num_zero)


def _matrices(
    weights: Weights, prefix: str, arrays: Sequence[Array], kind: ExpertKind, lead: tuple[int, ...]
) -> dict[str, Array]:
    """Of experts, or of the shared one: (up, up biases, down, down biases), by their names; those of the gate first."""
    up, up_bias, down, down_bias = arrays
    hidden, ffn = getattr(weights, f"{prefix}down_proj").shape[-2:]
    ups = up.reshape(*lead, kind.num_ups, ffn, hidden)
    found = {f"{prefix}down_proj": down.reshape(*lead, hidden, ffn)}
    if down_bias.size:
        found[f"{prefix}down_bias"] = down_bias.reshape(*lead, hidden)
    for part, name in enumerate(("gate", "up") if kind.gated else ("up",)):
        found[f"{prefix}{name}_proj"] = ups[..., part, :, :]
        if getattr(weights, f"{prefix}{name}_bias") is not None:
            found[f"{prefix}{name}_bias"] = up_bias.reshape(*lead, kind.num_ups, ffn)[..., part, :]
    return found
