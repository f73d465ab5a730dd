"""What the layer means: the oracle, in float64, one expert after the other (FlashMoE, section 2).

`y[t] = sum_j weight[t, j] * expert_ffn(x[t], topk_idx[t, j])` over the pairs that are not dropped. Capacity counts per
(source rank, expert), in token order; a dropped pair adds nothing, the other weights stay as they are, and a token that
lost all its pairs gets a row of zeros. So does a pair without a choice (index -1), and one of weight 0 whatever its
expert makes of the token. Leaves out: ranks as processes, messages, tiles, rounding to the element type, of which only
overflow is kept: logits are infinite beyond the accumulator's range (their tokens get NaN weights), hidden rows, expert
results and y beyond the element type's.

A choice of a zero-computation expert adds `weight * x[t]`, or nothing (`config.zero`); behind all choices the shared
expert adds its part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import Array, check_array, check_floating, overflowed
from .config import MoEConfig
from .experts import expert_ffn, shared_ffn
from .packets import make_packets
from .routers import Routing, external_routing, route
from .weights import Weights

PerRank = Array | Sequence[Array]


def moe_layer(
    x: PerRank,
    weights: Weights,
    config: MoEConfig,
    topk_idx: PerRank | None = None,
    topk_weights: PerRank | None = None,
) -> Array | list[Array]:
    """The layer's results in float64, in the same form as `x`.

    Args:
        x: `[num_ranks, num_tokens, hidden]`; or a list with one `[num_tokens_of_rank, hidden]` per rank, of different
            lengths if you like; or `[num_tokens, hidden]`, which is one source, of any length.
        weights: all experts of the layer.
        topk_idx, topk_weights: `[..., num_topk]`, in the form of x: a routing to use instead of the router's own.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    weights.check_all(config)
    tokens = sources(x, config)
    routings = source_routings(tokens, weights, config, topk_idx, topk_weights)
    packets = [make_packets(routing.topk_idx, config) for routing in routings]
    y = [np.zeros((len(part), config.hidden)) for part in tokens]
    for expert in range(config.num_experts):
        pairs = [packet.pairs(expert) for packet in packets]
        rows = np.concatenate([part[pair // config.num_topk] for part, pair in zip(tokens, pairs, strict=True)])
        results = expert_ffn(rows, weights, expert, config)
        ends = np.cumsum([len(pair) for pair in pairs])[:-1]
        for source, (pair, result) in enumerate(zip(pairs, np.split(results, ends), strict=True)):
            factor = routings[source].topk_weights.ravel()[pair].astype(np.float64)[:, None]
            with np.errstate(invalid="ignore"):  # 0 * inf
                term = np.where(factor != 0, factor * result, 0)
                y[source][pair // config.num_topk] += term  # an expert has a token at most once
    for part, routing, result in zip(tokens, routings, y, strict=True):
        _add_identities(result, part, routing, config)
        if config.shared_ffn:
            result += shared_ffn(part, weights, config)
    return _like(x, [overflowed(part, config.numpy_dtype) for part in y])


def _add_identities(y: Array, x: Array, routing: Routing, config: MoEConfig) -> None:
    """What the choices of zero-computation experts add to the results of one source."""
    if config.zero != "identity":
        return
    for idx, weights in zip(routing.topk_idx.T, routing.topk_weights.T, strict=True):
        factor = np.where(idx >= config.num_experts, weights, 0).astype(np.float64)[:, None]
        with np.errstate(invalid="ignore"):  # 0 * inf
            y += np.where(factor != 0, factor * x.astype(np.float64), 0)


def sources(x: PerRank, config: MoEConfig) -> list[Array]:
    """The tokens of each source rank, `[num_tokens_of_rank, hidden]`, from any form of x that `moe_layer` takes.

    Raises:
        TypeError, ValueError: not one part per rank, more tokens than `config.num_tokens` on a rank, another `hidden`.
    """
    if isinstance(x, np.ndarray) and x.ndim == 2:
        return [check_floating("x", check_array("x", x, (None, config.hidden)))]
    if isinstance(x, np.ndarray) and x.dtype == object:
        raise TypeError("x must be a list if ranks' numbers of tokens differ, got an array of objects: list(x)?")
    if len(x) != config.num_ranks:
        raise ValueError(f"x must have one part for each of num_ranks={config.num_ranks}, got {len(x)}")
    for rank, part in enumerate(x):
        check_floating(f"x[{rank}]", check_array(f"x[{rank}]", part, (None, config.hidden)))
        if len(part) > config.num_tokens:
            raise ValueError(f"x[{rank}] must have at most num_tokens={config.num_tokens} rows, got {len(part)}")
    return list(x)


def source_routings(
    tokens: list[Array], weights: Weights, config: MoEConfig, topk_idx: PerRank | None, topk_weights: PerRank | None
) -> list[Routing]:
    """One routing per source: the router's own in float64, or the given one, checked."""
    if (topk_idx is None) != (topk_weights is None):
        given, missing = ("topk_weights", "topk_idx") if topk_idx is None else ("topk_idx", "topk_weights")
        raise ValueError(f"{given} is given, but {missing} is not: give both or none")
    if topk_idx is None or topk_weights is None:
        return [route(part, weights.router, config) for part in tokens]
    idx, factors = (_per_source(n, v, len(tokens)) for n, v in (("topk_idx", topk_idx), ("topk_weights", topk_weights)))
    return [external_routing(i, w, config, len(part)) for i, w, part in zip(idx, factors, tokens, strict=True)]


def _per_source(name: str, values: PerRank, num_sources: int) -> list[Array]:
    parts = [values] if isinstance(values, np.ndarray) and values.ndim == 2 else list(values)
    if len(parts) != num_sources:
        raise ValueError(f"{name} must have as many parts as x, {num_sources}, got {len(parts)}")
    return parts


def _like(x: PerRank, y: list[Array]) -> Array | list[Array]:
    if not isinstance(x, np.ndarray):
        return y
    return y[0] if x.ndim == 2 else np.stack(y)
