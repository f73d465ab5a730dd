"""The gradients of one expert's feed-forward network in float64, from those of its results.

With A the hidden row of a pair, w its weight and dy the gradient of its token's result:

    dA = dy W_down            gradient of w = sum(dA * A) + dy . b_down
    dh = w dA * dA/dh         for each product h with an up matrix
    dx = sum of dh W          over the up matrices
    dW_down = sum of dy (w A)^T, dW = sum of dh x^T over the rows; biases' are the sums of w dy and of dh

so no result is needed but through a norm, which makes another dy of dy, in the element type. A bound has slope 0
outside its limits and 1 at them, as PyTorch's clamp has; a NaN is not outside, so that it is seen.

As in `experts`, what leaves the range of the type that an implementation holds it in becomes infinite: products kept
for the backward, w A, dh and dx in the element type's, dA in the accumulator's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .activations import activation, activation_slope, capped_slope, sigmoid, sigmoid_slope
from .arrays import Array, overflowed
from .config import MoEConfig
from .experts import activate, gated_factors, linear, normalize, soft_capped
from .layer_kinds import ExpertKind
from .weights import Weights


@dataclass(frozen=True, eq=False)
class ExpertGradients:
    """Of `rows` rows that one expert was given.

    Args:
        x: `[rows, hidden]`.
        factors: `[rows]`, of what each row's result is multiplied by.
        arrays: sums over the rows, by their names in `Weights`: the expert's, without its axis, and result_scale.
    """

    x: Array
    factors: Array
    arrays: dict[str, Array]


def expert_backward(
    x: Array,
    dy: Array,
    factors: Array,
    weights: Weights,
    expert_position: int,
    config: MoEConfig,
    kind: ExpertKind | None = None,
) -> ExpertGradients:
    """The gradients through `factors * expert_ffn(x, ...)`, with the arguments of `expert_ffn`.

    Args:
        dy: `[rows, hidden]`, of the results times their factors.
        factors: `[rows, 1]`.
    """
    kind = kind or config.expert_kind
    element = config.numpy_dtype
    with np.errstate(invalid="ignore", over="ignore"):
        ups = [overflowed(linear(x, *up, expert_position), config.accumulator) for up in weights.ups]
        hidden = overflowed(activate(ups, kind), element)
        arrays: dict[str, Array] = {}
        d_result, d_factors = dy.astype(np.float64), None
        if kind.norm_eps is not None:
            result = overflowed(linear(hidden, weights.down_proj, weights.down_bias, expert_position), element)
            d_factors = (d_result * normalize(result, weights, kind)).sum(axis=1)
            d_result, arrays["result_scale"] = _norm_backward(result, d_result, factors, weights, kind)
            d_result = overflowed(d_result, element)
        down, bias = weights.down_proj[expert_position].astype(np.float64), weights.down_bias
        d_hidden = overflowed(d_result @ down, config.accumulator)
        if d_factors is None:
            d_factors = (d_hidden * hidden).sum(axis=1)
            d_factors += 0 if bias is None else d_result @ bias[expert_position].astype(np.float64)
        kept = [overflowed(up, element) for up in ups]
        d_ups = [overflowed(factors * d_hidden * slope, element) for slope in slopes(kept, kind)]
        arrays |= {"down_proj": d_result.T @ overflowed(factors * hidden, element)}
        arrays |= {"down_bias": (factors * d_result).sum(axis=0)}
        dx = np.zeros(x.shape)
        for name, (matrices, _), d_up in zip(_up_names(kind), weights.ups, d_ups, strict=True):
            dx += d_up @ matrices[expert_position].astype(np.float64)
            arrays |= {f"{name}_proj": d_up.T @ x.astype(np.float64), f"{name}_bias": d_up.sum(axis=0)}
    return ExpertGradients(overflowed(dx, element), d_factors, arrays)


def _up_names(kind: ExpertKind) -> tuple[str, ...]:
    """In the order of `Weights.ups`."""
    return ("gate", "up") if kind.gated else ("up",)


def slopes(products: Sequence[Array], kind: ExpertKind) -> list[Array]:
    """The derivatives of `activate(products, kind)` by each of the products."""
    if not kind.gated:
        return [activation_slope(kind.activation, products[0])]
    active, up = gated_factors(products, kind)
    return [_gate_slope(products[0], kind) * up, active * _up_slope(products[1], kind)]


def _gate_slope(gate: Array, kind: ExpertKind) -> Array:
    """Of the first of `gated_factors`."""
    z, limit = gate * kind.slope, kind.gate_limit
    if kind.bound == "softcap":
        assert limit is not None
        return capped_slope(gate, limit) * sigmoid(z) + soft_capped(gate, limit) * kind.slope * sigmoid_slope(z)
    slope = activation_slope(kind.activation, z)
    if limit is None:
        return slope
    bounded = gate if kind.bound == "clamp" else activation(kind.activation, z) / kind.slope
    return np.where(bounded > limit, 0.0, slope)


def _up_slope(up: Array, kind: ExpertKind) -> Array:
    """Of the second of `gated_factors`."""
    if kind.bound == "softcap":
        assert kind.up_limit is not None
        return capped_slope(up, kind.up_limit)
    return np.where(np.abs(up) > (kind.up_limit or np.inf), 0.0, 1.0)


def _norm_backward(
    results: Array, dy: Array, factors: Array, weights: Weights, kind: ExpertKind
) -> tuple[Array, Array]:
    """Through `normalize`: the gradient of the results, and `[hidden]` of result_scale."""
    assert weights.result_scale is not None and kind.norm_eps is not None
    scale = weights.result_scale.astype(np.float64)
    scaled = results * scale
    root = np.sqrt((scaled * scaled).mean(axis=-1, keepdims=True) + kind.norm_eps)
    normed = scaled / root
    d_scaled = (dy - normed * (dy * normed).mean(axis=-1, keepdims=True)) / root
    return d_scaled * scale, (factors * d_scaled * results).sum(axis=0)


def shared_backward(x: Array, dy: Array, weights: Weights, config: MoEConfig) -> tuple[Array, dict[str, Array]]:
    """Through `shared_ffn`: the gradient `[rows, hidden]` of x, and those of the shared arrays by their names.

    A row whose factor is 0 has none.
    """
    assert weights.shared is not None, "the config has a shared expert"
    factors, gate, dx = np.ones((len(x), 1)), weights.shared_gate_weight, np.zeros(x.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        if gate is not None:
            logits = overflowed(linear(x, gate[None, None], None, 0), config.accumulator)
            factors = sigmoid(logits)
        rows = np.flatnonzero(factors)
        part = expert_backward(x[rows], dy[rows], factors[rows], weights.shared, 0, config, config.shared_kind)
        arrays, dx[rows] = part.arrays, part.x
        if gate is not None:
            d_logits = part.factors * sigmoid_slope(logits[rows, 0])
            dx[rows] += np.outer(d_logits, gate.astype(np.float64))
            arrays = arrays | {"gate_weight": d_logits @ x[rows].astype(np.float64)}
    return dx, {f"shared_{name}": array for name, array in arrays.items()}
