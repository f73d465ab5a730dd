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
from .routers import Routing, exact_logits, external_routing, route_logits
from .weights import Weights

PerRank = Array | Sequence[Array]


def moe_layer(
    x: PerRank,
    weights: Weights,
    config: MoEConfig,
    topk_idx: PerRank | None = None,
    topk_weights: PerRank | None = None,
    logits: PerRank | None = None,
) -> Array | list[Array]:
    """The layer's results in float64, in the same form as `x`.

    Args:
        x: `[num_ranks, num_tokens, hidden]`; or a list with one `[num_tokens_of_rank, hidden]` per rank, of different
            lengths if you like; or `[num_tokens, hidden]`, which is one source, of any length.
        weights: all experts of the layer.
        topk_idx, topk_weights: `[..., num_topk]`, in the form of x: a routing to use instead of the router's own. A
            router with choice "given" takes topk_idx alone, and makes the weights.
        logits: `[..., num_choices]`, in the form of x: instead of the router's own products, to be routed by its kind.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    weights.check_all(config)
    tokens = sources(x, config)
    routings = source_routings(tokens, weights, config, topk_idx, topk_weights, logits)
    packets = [make_packets(routing.topk_idx, config) for routing in routings]
    y = [np.zeros((len(part), config.hidden)) for part in tokens]
    for expert in range(config.num_experts):
        pairs = [packet.pairs(expert) for packet in packets]
        factors = [r.topk_weights.ravel()[p].astype(np.float64)[:, None] for r, p in zip(routings, pairs, strict=True)]
        rows = np.concatenate([
            expert_input(part[pair // config.num_topk], factor, config)
            for part, pair, factor in zip(tokens, pairs, factors, strict=True)
        ])  # fmt: skip
        results = expert_ffn(rows, weights, expert, config)
        ends = np.cumsum([len(pair) for pair in pairs])[:-1]
        for source, (pair, result) in enumerate(zip(pairs, np.split(results, ends), strict=True)):
            with np.errstate(invalid="ignore"):  # infinities of both signs
                y[source][pair // config.num_topk] += expert_term(
                    result, factors[source], config
                )  # a token once at most
    for part, routing, result in zip(tokens, routings, y, strict=True):
        _add_identities(result, part, routing, config)
        if config.shared_ffn:
            with np.errstate(invalid="ignore"):
                result += shared_ffn(part, weights, config)
    return like(x, [overflowed(part, config.numpy_dtype) for part in y])


def expert_input(rows: Array, factors: Array, config: MoEConfig) -> Array:
    """What an expert gets of tokens `[rows, hidden]` with weights `[rows, 1]`."""
    if not config.router_kind.weight_input:
        return rows
    with np.errstate(invalid="ignore", over="ignore"):
        return overflowed(rows.astype(factors.dtype) * factors, config.numpy_dtype)


def expert_term(results: Array, factors: Array, config: MoEConfig) -> Array:
    """What results `[rows, hidden]` of an expert add to their tokens'; nothing, if the weight is 0."""
    with np.errstate(invalid="ignore"):  # 0 * inf
        term = results if config.router_kind.weight_input else factors * results
    return np.where(factors != 0, term, term.dtype.type(0))


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
    tokens: list[Array],
    weights: Weights,
    config: MoEConfig,
    topk_idx: PerRank | None,
    topk_weights: PerRank | None,
    logits: PerRank | None = None,
) -> list[Routing]:
    """One routing per source: the router's own in float64, that of the logits, or the given one, checked."""
    given = config.router_kind.choice == "given"
    _check_what_is_given(given, topk_idx, topk_weights, logits)
    if topk_idx is not None and topk_weights is not None:
        named = (("topk_idx", topk_idx), ("topk_weights", topk_weights))
        idx, factors = (per_source(name, values, len(tokens)) for name, values in named)
        return [external_routing(i, w, config, len(part)) for i, w, part in zip(idx, factors, tokens, strict=True)]
    scores = source_logits(tokens, weights, config, logits)
    if topk_idx is None:
        return [route_logits(part, config, weights) for part in scores]
    idx = per_source("topk_idx", topk_idx, len(tokens))
    none = [np.zeros(part.shape) for part in idx]
    fixed = [external_routing(i, w, config, len(part)) for i, w, part in zip(idx, none, tokens, strict=True)]
    return [route_logits(p, config, weights, routing.topk_idx) for p, routing in zip(scores, fixed, strict=True)]


def source_logits(tokens: list[Array], weights: Weights, config: MoEConfig, logits: PerRank | None) -> list[Array]:
    """`[num_tokens_of_rank, num_choices]` of each source: of the router, or the given ones, checked."""
    if logits is None:
        return [exact_logits(part, weights) for part in tokens]
    return checked_rows("logits", logits, tokens, config.num_choices)


def _check_what_is_given(
    given: bool, topk_idx: PerRank | None, topk_weights: PerRank | None, logits: PerRank | None
) -> None:
    if topk_weights is not None and topk_idx is None:
        raise ValueError("topk_weights is given, but topk_idx is not: give both or none")
    if topk_idx is not None and topk_weights is None and not given:
        raise ValueError("topk_idx is given, but topk_weights is not: give both or none")
    if topk_idx is None and given:
        raise ValueError("topk_idx must be given for a router with choice 'given'")
    if logits is not None and topk_weights is not None:
        raise ValueError("logits must be None if topk_weights is given: there is nothing left to be routed")


def checked_rows(name: str, values: PerRank, tokens: list[Array], width: int) -> list[Array]:
    """One `[num_tokens_of_rank, width]` per source, floating, from any form of x; else TypeError or ValueError."""
    parts = per_source(name, values, len(tokens))
    for source, (part, rows) in enumerate(zip(parts, tokens, strict=True)):
        check_floating(f"{name}[{source}]", check_array(f"{name}[{source}]", part, (len(rows), width)))
    return parts


def per_source(name: str, values: PerRank, num_sources: int) -> list[Array]:
    parts = [values] if isinstance(values, np.ndarray) and values.ndim == 2 else list(values)
    if len(parts) != num_sources:
        raise ValueError(f"{name} must have as many parts as x, {num_sources}, got {len(parts)}")
    return parts


def like(x: PerRank, y: list[Array]) -> Array | list[Array]:
    """The parts of the sources in the form of x."""
    if not isinstance(x, np.ndarray):
        return y
    return y[0] if x.ndim == 2 else np.stack(y)
