"""The gradients of logits in float64, from those of routing weights.

The weights that the forward used are a function of the logits, given which experts were chosen; the choice, by whatever
it is made (groups, selection bias, a table), has no gradient. A chosen expert whose pair was dropped still is in the
norm, and so has one by it. Of sparsemixer the weight is a softmax, and the gradient is its own, over the logits that
were near: so phimoe has it in training, where besides the choice is by lot and some weights are scaled by lot; with the
choice made here, of the best, its gradient is this one.

A row without a largest finite logit, whose weights are NaN, has NaN gradients.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .activations import capped_slope, sigmoid, sigmoid_slope
from .arrays import Array, overflowed
from .config import MoEConfig
from .layer_kinds import RouterKind
from .routers import are_routed, norm_of, normalized, prepared_logits, scale_free, scores_of, sparsemixer_terms
from .weights import Weights


def router_backward(
    logits: Array, topk_idx: Array, d_weights: Array, weights: Weights, config: MoEConfig
) -> tuple[Array, dict[str, Array]]:
    """The gradient `[num_tokens, num_choices]` of logits, and by name that of router_bias and of expert_scale.

    Args:
        logits: `[num_tokens, num_choices]`, as `route_logits` gets them.
        topk_idx: `[num_tokens, num_topk]`, what it made of them.
        d_weights: `[num_tokens, num_topk]`, of the weights that it made.
    """
    d_logits, d_scales = row_gradients(logits, topk_idx, d_weights, weights, config)
    d_scale = np.zeros(config.num_choices)
    np.add.at(d_scale, np.maximum(topk_idx, 0), d_scales)
    with np.errstate(invalid="ignore"):  # infinities of both signs
        return d_logits, {"router_bias": d_logits.sum(axis=0), "expert_scale": d_scale}


def row_gradients(
    logits: Array, topk_idx: Array, d_weights: Array, weights: Weights, config: MoEConfig
) -> tuple[Array, Array]:
    """As `router_backward`, but of expert_scale what each pair adds, `[num_tokens, num_topk]`."""
    kind = config.router_kind
    logits = overflowed(logits.astype(np.float64), config.accumulator)
    z = prepared_logits(logits, kind, weights, config.accumulator)
    good = are_routed(logits, z)[:, None]
    z = np.where(good, z, 0.0)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        dz, d_scales = _weigh_backward(z, topk_idx, np.where(good, d_weights, np.nan), kind, weights)
        d_logits = np.where(good, dz * _preparation_slope(logits, weights, config), np.nan)
    return d_logits, d_scales


def _preparation_slope(logits: Array, weights: Weights, config: MoEConfig) -> Array | float:
    """Of `prepared_logits`."""
    kind = config.router_kind
    if kind.logit_cap is None:
        return kind.logit_scale
    z = prepared_logits(logits, replace(kind, logit_cap=None), weights, config.accumulator)
    return capped_slope(z, kind.logit_cap) * kind.logit_scale


def _weigh_backward(
    z: Array, topk_idx: Array, d_factors: Array, kind: RouterKind, weights: Weights
) -> tuple[Array, Array]:
    """Through `weigh`: the gradient of z, and `[num_tokens, num_topk]`, of the scale of each pair's expert."""
    chosen, idx = topk_idx >= 0, np.maximum(topk_idx, 0)
    scores = scores_of(z, kind)
    terms = list(sparsemixer_terms(z, idx, kind.jitter)) if kind.score == "sparsemixer" else []
    picked = np.stack([w for _, w in terms], axis=1) if terms else np.take_along_axis(scores, idx, axis=1)
    picked = np.where(chosen, picked, 0.0)
    factors = normalized(picked, kind) if kind.renormalize else picked
    d_scales = np.zeros(idx.shape)
    if kind.expert_scale:
        assert weights.expert_scale is not None
        d_scales = np.where(chosen, d_factors * factors * kind.scale, 0.0)
        d_factors = d_factors * weights.expert_scale.astype(np.float64)[idx]
    d_factors = d_factors * kind.scale
    if kind.renormalize:
        d_factors = _normalize_backward(picked, d_factors, kind)
    d_factors = np.where(chosen, d_factors, 0.0)
    if terms:
        return _sparsemixer_backward(terms, idx, d_factors), d_scales
    d_scores = np.zeros(z.shape)
    np.add.at(d_scores, (np.arange(len(z))[:, None], idx), d_factors)
    return _score_backward(z, scores, d_scores, kind), d_scales


def _normalize_backward(scores: Array, d_factors: Array, kind: RouterKind) -> Array:
    """Through `normalized`; where the norm is less than norm_min, it has no part in it."""
    norm, order = norm_of(scores, kind), kind.norm_order
    divisor = np.maximum(norm + kind.norm_eps, kind.norm_min)
    d_norm = -(d_factors * (scores / divisor)).sum(axis=1, keepdims=True)
    d_norm = np.where(norm + kind.norm_eps >= kind.norm_min, d_norm, 0.0)
    share = np.where(scores > 0, (scores / norm) ** (order - 1), 0.0) if order != 1 else 1.0
    return (d_factors + d_norm * share) / divisor


def _score_backward(z: Array, scores: Array, d_scores: Array, kind: RouterKind) -> Array:
    """Through `scores_of`."""
    if kind.score == "sigmoid":
        return d_scores * sigmoid_slope(z)
    if kind.score == "sqrt_softplus":
        return d_scores * np.where(scores > 0, sigmoid(z) / (2 * scores), 0.0)
    if scale_free(kind):  # then the gradients of the exponentials add up to nothing that a common factor could change
        return d_scores * scores
    dz: Array = scores * (d_scores - (scores * d_scores).sum(axis=1, keepdims=True))
    return dz


def _sparsemixer_backward(choices: list[tuple[Array, Array]], idx: Array, d_factors: Array) -> Array:
    """Of each choice: its weight times (1 at its own logit, less the softmax over those near it)."""
    dz, rows = np.zeros(choices[0][0].shape), np.arange(len(idx))
    for j, (terms, factor) in enumerate(choices):
        change = d_factors[:, j] * factor
        dz -= (change * factor)[:, None] * terms
        dz[rows, idx[:, j]] += change
    return dz
