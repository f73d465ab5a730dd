"""The gradients of the layer: the oracle of its backward, in float64, one expert after the other.

Of `sum(dy * moe_layer(x, ...))` by the tokens, the routing weights, the logits and all arrays of `Weights`, with the
choice of experts as it is. `expert_gradients` and `router_gradients` have the formulas and their limits.

A pair that adds nothing, because it is dropped, is no choice or has weight 0, has no gradient of its own; a dropped one
still has a part in the norm of its token's weights. What is not finite spoils its own token's gradients, and those of
arrays that sum over that token; no other token's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from .arrays import Array, overflowed
from .config import MoEConfig
from .expert_gradients import expert_backward, shared_backward
from .layer import PerRank, checked_rows, expert_input, like, source_logits, source_routings, sources
from .packets import make_packets
from .router_gradients import router_backward
from .routers import Routing
from .weights import EXPERT_ARRAYS, Weights


@dataclass(frozen=True, eq=False)
class Gradients:
    """What `moe_layer_backward` returns, all in float64.

    Args:
        x: in the form of x.
        topk_weights: `[num_tokens_of_rank, num_topk]` of each source: of every pair's weight as the forward used it; 0
            of a pair that adds nothing.
        logits: `[num_tokens_of_rank, num_choices]` of each source: of logits as the product with the router makes them,
            before bias, scale and cap, or as they were given; None if topk_weights were given.
        weights: the arrays that there are, in their places; of what has no gradient, such as selection_bias, zeros.
    """

    x: Array | list[Array]
    topk_weights: list[Array]
    logits: list[Array] | None
    weights: Weights


def moe_layer_backward(
    x: PerRank,
    dy: PerRank,
    weights: Weights,
    config: MoEConfig,
    topk_idx: PerRank | None = None,
    topk_weights: PerRank | None = None,
    logits: PerRank | None = None,
    logits_gradient: PerRank | None = None,
) -> Gradients:
    """The gradients of a loss whose gradient by the layer's results is `dy`.

    Every kind of router and of expert has them. With `logits` given the router has none, and x has none by way of it.

    Args:
        x, weights, config, topk_idx, topk_weights, logits: as `moe_layer` had them.
        dy: `[..., hidden]`, in the form of x.
        logits_gradient: `[..., num_choices]`, in the form of x: added to the gradient of the logits (`Gradients`), for
            a loss that reads them. router_bias, which is added to logits later, has no part in it.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    weights.check_all(config)
    tokens = sources(x, config)
    routings = source_routings(tokens, weights, config, topk_idx, topk_weights, logits)
    if topk_weights is not None and logits_gradient is not None:
        raise ValueError("logits_gradient must be None if topk_weights is given: there are no logits")
    dys = checked_rows("dy", dy, tokens, config.hidden)
    parts = [Source(*given, config) for given in zip(tokens, dys, routings, strict=True)]
    total = zeros(weights)
    for part in parts:
        _experts_backward(part, weights, config, total)
        _identities_backward(part, config)
        if config.shared_ffn:
            _shared_backward(part, weights, config, total)
    d_logits = None
    if topk_weights is None:
        scores = source_logits(tokens, weights, config, logits)
        d_logits = _logits_backward(parts, scores, weights, config, total)
        if logits_gradient is not None:
            more = checked_rows("logits_gradient", logits_gradient, tokens, config.num_choices)
            with np.errstate(invalid="ignore"):  # infinities of both signs
                d_logits = [mine + part.astype(np.float64) for mine, part in zip(d_logits, more, strict=True)]
        if logits is None:
            _router_backward(parts, d_logits, weights, total)
    d_x = [overflowed(part.dx, config.numpy_dtype) for part in parts]
    return Gradients(like(x, d_x), [part.d_factors for part in parts], d_logits, replace(weights, **total))


class Source:
    """The tokens of one source rank, their routing, and the gradients that are summed up."""

    def __init__(self, x: Array, dy: Array, routing: Routing, config: MoEConfig) -> None:
        self.x, self.dy, self.routing = x, dy.astype(np.float64), routing
        self.factors = routing.topk_weights.astype(np.float64)
        self.packets = make_packets(routing.topk_idx, config)
        self.dx = np.zeros(x.shape)
        self.d_factors = np.zeros(self.factors.shape)

    def experts(self, config: MoEConfig) -> Iterator[tuple[int, Array, Array, Array]]:
        """Of each expert the pairs that add something, their tokens, and their weights `[rows, 1]`."""
        for expert in range(config.num_experts):
            pairs = self.packets.pairs(expert)
            pairs = pairs[self.factors.ravel()[pairs] != 0]
            yield expert, pairs, pairs // config.num_topk, self.factors.ravel()[pairs, None]

    def identities(self, config: MoEConfig) -> tuple[Array, Array]:
        """Tokens and places of the pairs of zero-computation experts that add something."""
        if config.zero != "identity":
            return np.empty(0, int), np.empty(0, int)
        rows, places = np.nonzero((self.routing.topk_idx >= config.num_experts) & (self.factors != 0))
        return rows, places


def zeros(weights: Weights) -> dict[str, Any]:
    """Zeros for each array of the weights, by name."""
    arrays = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return {name: np.zeros(array.shape) for name, array in arrays.items() if isinstance(array, np.ndarray)}


def add_arrays(total: dict[str, Any], arrays: dict[str, Array], expert: int | None = None) -> None:
    """Add to those that there are; an expert's to its place."""
    for name in arrays.keys() & total.keys():
        with np.errstate(invalid="ignore"):  # infinities of both signs
            total[name][expert if name in EXPERT_ARRAYS else ...] += arrays[name]


def _experts_backward(part: Source, weights: Weights, config: MoEConfig, total: dict[str, Any]) -> None:
    on_input = config.router_kind.weight_input
    for expert, pairs, rows, factors in part.experts(config):
        given, outside = expert_input(part.x[rows], factors, config), np.ones_like(factors) if on_input else factors
        found = expert_backward(given, part.dy[rows], outside, weights, expert, config)
        add_arrays(total, found.arrays, expert)
        with np.errstate(invalid="ignore", over="ignore"):
            d_factors = (found.x * part.x[rows].astype(np.float64)).sum(axis=1) if on_input else found.factors
            part.d_factors.ravel()[pairs] = d_factors
            part.dx[rows] += factors * found.x if on_input else found.x


def _identities_backward(part: Source, config: MoEConfig) -> None:
    """Through what the choices of zero-computation experts add."""
    rows, places = part.identities(config)
    with np.errstate(invalid="ignore", over="ignore"):
        part.d_factors[rows, places] = (part.dy[rows] * part.x[rows].astype(np.float64)).sum(axis=1)
        np.add.at(part.dx, rows, part.factors[rows, places][:, None] * part.dy[rows])


def _shared_backward(part: Source, weights: Weights, config: MoEConfig, total: dict[str, Any]) -> None:
    dx, arrays = shared_backward(part.x, part.dy, weights, config)
    with np.errstate(invalid="ignore"):
        part.dx += dx
    add_arrays(total, arrays)


def _logits_backward(
    parts: list[Source], logits: list[Array], weights: Weights, config: MoEConfig, total: dict[str, Any]
) -> list[Array]:
    """`[num_tokens_of_rank, num_choices]` of each source."""
    gradients = []
    for part, scores in zip(parts, logits, strict=True):
        gradient, arrays = router_backward(scores, part.routing.topk_idx, part.d_factors, weights, config)
        add_arrays(total, arrays)
        gradients.append(gradient)
    return gradients


def _router_backward(parts: list[Source], d_logits: list[Array], weights: Weights, total: dict[str, Any]) -> None:
    """Through the product of the tokens with the router."""
    router = weights.router.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        for part, gradient in zip(parts, d_logits, strict=True):
            part.dx += gradient @ router
            total["router"] += gradient.T @ part.x.astype(np.float64)
