"""From tokens to experts: scores, the greedy top-k and weights, by the kind of router; or a routing from outside.

The usual kind is softmax over all experts (FlashMoE, section 2). Invariants, of every kind: a token's routing depends
on that token only. Experts of a row are distinct, best first by what the choice is made on; equal ones are taken by the
lowest expert index, equal groups by the lowest group. A routing from outside may leave choices out: index -1. Leaves
out: noise and losses of training; routers that are no matrix, which bring their logits (`moe_layer(logits=...)`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .activations import sigmoid
from .arrays import Array, check_array, check_floating, overflowed
from .config import MoEConfig
from .layer_kinds import RouterKind
from .weights import Weights


@dataclass(frozen=True, eq=False)
class Routing:
    """Experts of each token, best first, and the factors of their results.

    Args:
        topk_idx: `[num_tokens, num_topk]` int32, global expert indices; from `num_experts` on zero-computation experts;
            -1: no choice (only from outside).
        topk_weights: `[num_tokens, num_topk]` floating; that of no choice is 0.
    """

    topk_idx: Array
    topk_weights: Array


def softmax_topk(logits: Array, num_topk: int, renormalize: bool) -> Routing:
    """The k best experts of each row of `logits` `[num_tokens, num_choices]` by softmax, in the dtype of `logits`.

    Weights are the softmax probabilities p, or with `renormalize` p / (sum of the k chosen p). The choice is made on
    logits: the same order as that of p, but without the ties that underflow would make.

    A row without a largest finite logit (it has a NaN or +inf, or only -inf) goes to experts 0 to k - 1 with NaN
    weights: bad input stays in its token's row, where it is seen, and hits no other token.
    """
    return choose(logits, RouterKind(renormalize=renormalize), num_topk)


def choose(
    logits: Array,
    kind: RouterKind,
    num_topk: int,
    weights: Weights | None = None,
    topk_idx: Array | None = None,
    accumulator: np.dtype[Any] | None = None,
) -> Routing:
    """The routing by `logits` `[num_tokens, num_choices]`, as they come from the matrix, computed in their dtype.

    A row without a largest finite logit, before or after bias, scale and cap, is as in `softmax_topk`, whatever the
    kind.

    Args:
        weights: with the biases and scales that the kind asks for.
        topk_idx: `[num_tokens, num_topk]`, checked, for choice "given"; -1: no choice.
        accumulator: beyond the range of this type logits become infinite; None: that of `logits`.
    """
    z = prepared_logits(logits, kind, weights, accumulator or logits.dtype)
    good = are_routed(logits, z)
    z = np.where(good[:, None], z, z.dtype.type(0))
    scores = scores_of(z, kind)
    idx = topk_idx
    if idx is None:
        idx = _choose_best(choice_values(z, scores, kind, weights), kind, num_topk)
        idx[~good] = np.arange(num_topk)
    factors = weigh(z, scores, idx, kind, weights)
    factors[~good] = np.nan
    return Routing(idx.astype(np.int32), np.where(idx >= 0, factors, factors.dtype.type(0)))


def are_routed(logits: Array, z: Array) -> npt.NDArray[np.bool_]:
    """`[num_tokens]`: have the logits, and those prepared z, a largest finite one? The maximum is NaN if any is."""
    good: npt.NDArray[np.bool_] = np.isfinite(logits.max(axis=1)) & np.isfinite(z.max(axis=1))
    return good


def prepared_logits(logits: Array, kind: RouterKind, weights: Weights | None, accumulator: np.dtype[Any]) -> Array:
    """Logits with bias, scale and cap, `[num_tokens, num_choices]`; infinite beyond the range of the accumulator."""
    z = logits
    with np.errstate(over="ignore", invalid="ignore"):
        if kind.logit_bias:
            assert weights is not None and weights.router_bias is not None
            z = overflowed(z + weights.router_bias.astype(z.dtype), accumulator)
        if kind.logit_scale != 1:
            z = overflowed(z * kind.logit_scale, accumulator)
        if kind.logit_cap is not None:
            z = np.tanh(z / kind.logit_cap) * kind.logit_cap
    return z


def scores_of(z: Array, kind: RouterKind) -> Array:
    """`[num_tokens, num_choices]`: the score of each expert; of sparsemixer, where it depends on the choice, logits."""
    with np.errstate(over="ignore", under="ignore"):  # a difference of -inf is a probability of 0
        if kind.score == "sigmoid":
            return sigmoid(z)
        if kind.score == "sqrt_softplus":
            root: Array = np.sqrt(np.logaddexp(z.dtype.type(0), z))
            return root
        if kind.score == "sparsemixer":
            return z
        exponentials: Array = np.exp(z - z.max(axis=1, keepdims=True))
    return exponentials if scale_free(kind) else exponentials / exponentials.sum(axis=1, keepdims=True)


def scale_free(kind: RouterKind) -> bool:
    """Is it all the same to the choice and the weights if the scores of a token are multiplied by any number?"""
    return kind.renormalize and kind.choice != "score" and kind.norm_eps == kind.norm_min == 0


def choice_values(z: Array, scores: Array, kind: RouterKind, weights: Weights | None) -> Array:
    """`[num_tokens, num_choices - num_always]`: what the choice is made on, before groups are left out."""
    values = z if kind.choice == "logits" else scores
    values = values[:, : values.shape[1] - kind.num_always]
    if kind.selection_bias:
        assert weights is not None and weights.selection_bias is not None
        values = values + weights.selection_bias.astype(z.dtype)
    return values


def _choose_best(values: Array, kind: RouterKind, num_topk: int) -> Array:
    if kind.num_groups > 1:
        grouped = values.reshape(len(values), kind.num_groups, values.shape[1] // kind.num_groups)
        open_groups = np.zeros(grouped.shape[:2], bool)
        np.put_along_axis(open_groups, _best(group_scores(grouped, kind), kind.num_topk_groups), True, axis=1)
        fill = values.dtype.type(-np.inf if kind.group_fill == "lowest" else 0)
        values = np.where(open_groups[:, :, None], grouped, fill).reshape(values.shape)
    always = np.arange(values.shape[1], values.shape[1] + kind.num_always)
    chosen = _best(values, num_topk - kind.num_always)
    return np.concatenate([chosen, np.broadcast_to(always, (len(values), kind.num_always))], axis=1)


def group_scores(grouped: Array, kind: RouterKind) -> Array:
    """`[num_tokens, num_groups]`, of values `[num_tokens, num_groups, experts of a group]`."""
    if kind.group_score == "max":
        best: Array = grouped.max(axis=2)
        return best
    total: Array = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    return total


def _best(values: Array, number: int) -> Array:
    """Indices of the largest of each row, falling; the lowest index first where they are equal."""
    return np.argsort(-values, axis=1, kind="stable")[:, :number]


def weigh(z: Array, scores: Array, topk_idx: Array, kind: RouterKind, weights: Weights | None) -> Array:
    """`[num_tokens, num_topk]`: weights of these experts; no choice (-1) has no part in the norm."""
    chosen = topk_idx >= 0
    idx = np.where(chosen, topk_idx, 0)
    if kind.score == "sparsemixer":
        factors = sparsemixer(z, idx, kind.jitter)
    else:
        factors = np.take_along_axis(scores, idx, axis=1)
    factors = np.where(chosen, factors, factors.dtype.type(0))
    if kind.renormalize:
        factors = normalized(factors, kind)
    if kind.scale != 1:
        factors = factors * kind.scale
    if kind.expert_scale:
        assert weights is not None and weights.expert_scale is not None
        factors = factors * weights.expert_scale.astype(factors.dtype)[idx]
    return factors


def normalized(factors: Array, kind: RouterKind) -> Array:
    """`[num_tokens, num_topk]`: the chosen scores divided by their norm."""
    with np.errstate(invalid="ignore", divide="ignore"):  # all scores 0: the row is NaN
        quotients: Array = factors / np.maximum(norm_of(factors, kind) + kind.norm_eps, kind.norm_min)
    return quotients


def norm_of(factors: Array, kind: RouterKind) -> Array:
    """`[num_tokens, 1]`."""
    order = kind.norm_order
    norm: Array = (factors if order == 1 else factors**order).sum(axis=1, keepdims=True)
    return norm if order == 1 else norm ** (1 / order)


def sparsemixer(z: Array, idx: Array, jitter: float | Array) -> Array:
    """The weight of choice j: its softmax among the experts not chosen before j whose logits are near its own.

    Of a logit of -inf, which is chosen where no finite one is left, it is NaN.

    Args:
        jitter: one, or one for each of `z`.
    """
    return np.stack([factor for _, factor in sparsemixer_terms(z, idx, jitter)], axis=1)


def sparsemixer_terms(z: Array, idx: Array, jitter: float | Array) -> Iterator[tuple[Array, Array]]:
    """For each choice j the terms `[num_tokens, num_choices]` that 1 / its weight is the sum of, and the weight."""
    z = z.copy()
    for j in range(idx.shape[1]):
        best = np.take_along_axis(z, idx[:, j : j + 1], axis=1)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):  # 0 / 0 is near; what is taken is -inf
            far = (best - z) / np.maximum(np.abs(z), best) > 2 * jitter
            terms = np.where(far | np.isinf(z), z.dtype.type(0), np.exp(z - best))
            factor = np.where(np.isfinite(best[:, 0]), 1 / terms.sum(axis=1), z.dtype.type(np.nan))
        yield terms, factor
        np.put_along_axis(z, idx[:, j : j + 1], -np.inf, axis=1)


def route(x: Array, router: Array | Weights, config: MoEConfig, topk_idx: Array | None = None) -> Routing:
    """The routing of `x` `[num_tokens, hidden]` by its router, in float64.

    Logits beyond the range of `config.accumulator`, in which an implementation has them, are infinite, be it by their
    bias or their scale: a token whose largest logit is has NaN weights (`softmax_topk`).

    Args:
        router: the matrix `[num_choices, hidden]`, or weights, for a kind that asks for biases or scales.
        topk_idx: as `external_routing` returns them, for a kind with choice "given".
    """
    weights = router if isinstance(router, Weights) else None
    return route_logits(exact_logits(x, router), config, weights, topk_idx)


def route_logits(
    logits: Array, config: MoEConfig, weights: Weights | None = None, topk_idx: Array | None = None
) -> Routing:
    """`route`, from `logits` `[num_tokens, num_choices]`."""
    logits = overflowed(logits.astype(np.float64), config.accumulator)
    return choose(logits, config.router_kind, config.num_topk, weights, topk_idx, config.accumulator)


def exact_logits(x: Array, router: Array | Weights) -> Array:
    """`[num_tokens, num_choices]` in float64, without bias."""
    matrix = router.router if isinstance(router, Weights) else router
    with np.errstate(invalid="ignore", over="ignore"):
        logits: Array = x.astype(np.float64) @ matrix.astype(np.float64).T
    return logits


def external_routing(topk_idx: Array, topk_weights: Array, config: MoEConfig, num_tokens: int) -> Routing:
    """A checked copy of a routing made elsewhere.

    Args:
        topk_idx: `[num_tokens, num_topk]`, any integer dtype, experts distinct in each row. -1 and `num_choices`, which
            frameworks pad with, are no choice, as often as you like: no slot, nothing sent, nothing added. (With
            zero-computation experts `num_experts` is the first of these.)
        topk_weights: `[num_tokens, num_topk]`, any floating dtype; used as they are, not normalised. That of no choice
            is not looked at.

    Returns:
        Indices as int32, weights as `config.accumulator`; no choice is index -1 and weight 0.

    Raises:
        TypeError, ValueError: naming the argument, the row, its values and the rule.
    """
    shape = (num_tokens, config.num_topk)
    if check_array("topk_idx", topk_idx, shape).dtype.kind not in "iu":
        raise TypeError(f"topk_idx must have an integer dtype, got {topk_idx.dtype}")
    check_floating("topk_weights", check_array("topk_weights", topk_weights, shape))
    end, name = config.num_choices, "num_choices" if config.num_zero else "num_experts"
    outside = (topk_idx.min(axis=1) < -1) | (topk_idx.max(axis=1) > end)
    rule = f"values must be in [0, {name}={end}), or -1 or {end} for no choice"
    _raise_at(outside, topk_idx, rule)
    chosen = (topk_idx >= 0) & (topk_idx < end)
    idx, weights = np.full(shape, -1, np.int32), np.zeros(shape, config.accumulator)
    idx[chosen], weights[chosen] = topk_idx[chosen], topk_weights[chosen]
    _raise_at(has_repeats(idx), topk_idx, "the experts of a token must be distinct")
    return Routing(idx, weights)


def has_repeats(topk_idx: Array) -> npt.NDArray[np.bool_]:
    """`[num_tokens]`: does the row name an expert twice? No choice (-1) is no expert."""
    ordered = np.sort(topk_idx, axis=1)
    repeats: npt.NDArray[np.bool_] = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    return repeats


def _raise_at(bad: npt.NDArray[np.bool_], topk_idx: Array, rule: str) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"topk_idx: {rule}, got {topk_idx[row].tolist()} in row {row}")
