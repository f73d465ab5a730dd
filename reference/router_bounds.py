"""How far the gradients of a router may be off, from those of the weights that it made, taken as they are.

As in `gradient_bounds`, for a router that computes in the accumulator's type alone. A logit is off by the walk of its
product; what a gradient changes by from there to an end of that interval is an error of its own for each logit, and
their squares add. The roundings of a gradient itself are in proportion to the parts of it that each weight brings, and
to the weight times its gradient, from which softmax and sigmoid take another part away. An exponential below normal
numbers may be 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Array
from .config import MoEConfig
from .gradient_bounds import least, sized
from .router_gradients import row_gradients
from .routers import exact_logits, prepared_logits, route_logits, scale_free, scores_of
from .tolerance import walk
from .weights import Weights


@dataclass(frozen=True, eq=False)
class RouterBounds:
    """The most that each element may be off.

    Args:
        logits: `[num_tokens, num_choices]`.
        x: `[num_tokens, hidden]`, of what the router adds to the gradient of x.
        arrays: of router, router_bias and expert_scale, by name.
    """

    logits: Array
    x: Array
    arrays: dict[str, Array]


def router_tolerance(x: Array, topk_idx: Array, d_weights: Array, weights: Weights, config: MoEConfig) -> RouterBounds:
    """Bounds of `router_backward(exact_logits(x, weights), topk_idx, d_weights, ...)`, and of its products.

    Args:
        x: `[num_tokens, hidden]`, of one source.
        topk_idx, d_weights: `[num_tokens, num_topk]`, the routing, and the gradients of its weights.
    """
    logits = exact_logits(x, weights)
    d_logits, d_scales = row_gradients(logits, topk_idx, d_weights, weights, config)
    squares, scale_squares = _moved(logits, x, topk_idx, d_weights, weights, config)
    own, own_scales = _parts(logits, topk_idx, d_weights, weights, config)
    elementwise, rows = walk(config, config.num_choices, 0), walk(config, len(x), 0)
    squares += elementwise**2 * (own + d_logits**2)
    squares += (least(config.accumulator) * np.abs(d_weights).sum(axis=1, keepdims=True)) ** 2
    scale_squares += elementwise**2 * (own_scales + d_scales**2)
    x_squares, matrix = x.astype(np.float64) ** 2, weights.router.astype(np.float64)
    dx = elementwise**2 * (d_logits**2 @ matrix**2 + (d_logits @ matrix) ** 2) + squares @ matrix**2
    router = rows**2 * ((d_logits.T @ x.astype(np.float64)) ** 2 + (d_logits**2).T @ x_squares) + squares.T @ x_squares
    bias = rows**2 * (d_logits.sum(axis=0) ** 2 + (d_logits**2).sum(axis=0)) + squares.sum(axis=0)
    scale = np.zeros(config.num_choices)
    np.add.at(scale, np.maximum(topk_idx, 0), scale_squares + (rows * d_scales) ** 2 * len(x))
    arrays = {"router": np.sqrt(router), "router_bias": np.sqrt(bias), "expert_scale": np.sqrt(scale)}
    return RouterBounds(np.sqrt(squares), np.sqrt(dx), arrays)


def _moved(
    logits: Array, x: Array, topk_idx: Array, d_weights: Array, weights: Weights, config: MoEConfig
) -> tuple[Array, Array]:
    """The squares of what `row_gradients` change by, with each logit moved by as much as it may be off."""
    exact = row_gradients(logits, topk_idx, d_weights, weights, config)
    step = walk(config, config.hidden, 0) * sized(x, weights.router[None], None, 0)[1]
    squares = np.zeros(exact[0].shape), np.zeros(exact[1].shape)
    for choice in range(config.num_choices):
        way = np.where(np.arange(config.num_choices) == choice, step, 0.0)
        ends = [row_gradients(logits + sign * way, topk_idx, d_weights, weights, config) for sign in (1, -1)]
        for square, value, *moved in zip(squares, exact, *ends, strict=True):
            square += np.maximum(*((end - value) ** 2 for end in moved))
    return squares


def _parts(
    logits: Array, topk_idx: Array, d_weights: Array, weights: Weights, config: MoEConfig
) -> tuple[Array, Array]:
    """The squares of the parts that `row_gradients` are sums of."""
    kind = config.router_kind
    factors = np.where(topk_idx >= 0, route_logits(logits, config, weights, topk_idx).topk_weights, 0.0)
    whole = kind.logit_scale * factors * d_weights
    squares, scale_squares = np.zeros(logits.shape), np.zeros(topk_idx.shape)
    if kind.renormalize:  # the norm takes parts of all choices away
        whole = np.broadcast_to(np.sqrt((whole**2).sum(axis=1, keepdims=True)), whole.shape)
        if kind.score == "softmax" and not scale_free(kind):  # of what is left softmax takes a part from every logit
            scores = scores_of(prepared_logits(logits, kind, weights, config.accumulator), kind)
            squares += scores**2 * (whole**2).sum(axis=1, keepdims=True)
    np.add.at(squares, (np.arange(len(logits))[:, None], np.maximum(topk_idx, 0)), whole**2)
    for j in range(config.num_topk):
        alone = np.where(np.arange(config.num_topk) == j, d_weights, 0.0)
        for square, part in zip(
            (squares, scale_squares), row_gradients(logits, topk_idx, alone, weights, config), strict=True
        ):
            square += part**2
    return squares, scale_squares
