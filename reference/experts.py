"""One expert's feed-forward network in float64: what the tiles and kernels are compared with.

    plain   act(x W_up^T + b_up) W_down^T + b_down
    gated   (a(x W_gate^T + b_gate) * (x W_up^T + b_up + up_offset)) W_down^T + b_down

with what `ExpertKind` says of a, of bounds of the two products, and of a norm of the result.

Nothing is rounded on the way, but what leaves the range of the type that an implementation holds it in becomes
infinite, as rounding makes it: products with the up matrices in the accumulator's range, hidden rows and results in the
element type's. So oracle and kernel are infinite or NaN in the same places. Leaves out: sums that overflow on the way
and come back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from .activations import activation, sigmoid
from .arrays import Array, overflowed
from .config import MoEConfig
from .layer_kinds import ExpertKind
from .weights import Weights


def activate(products: Sequence[Array], kind: ExpertKind) -> Array:
    """The rows between the two products; `products` are those with the up matrices, as `Weights.ups` has them."""
    if not kind.gated:
        return activation(kind.activation, products[0])
    active, up = gated_factors(products, kind)
    return active * up


def gated_factors(products: Sequence[Array], kind: ExpertKind) -> tuple[Array, Array]:
    """What a gated row is the product of: of the gate's product, and of the up product."""
    gate, up = products
    if kind.bound == "clamp":
        gate = _at_most(gate, kind.gate_limit)
    active = activation(kind.activation, gate * kind.slope) / kind.slope  # 1 changes no bit
    if kind.bound == "clamp_activated":
        active = _at_most(active, kind.gate_limit)
    if kind.bound == "softcap":
        active = soft_capped(gate, kind.gate_limit) * sigmoid(gate * kind.slope)
        up = soft_capped(up, kind.up_limit)
    elif kind.up_limit is not None:
        up = np.clip(up, -kind.up_limit, kind.up_limit)
    return active, up + kind.up_offset if kind.up_offset else up


def _at_most(values: Array, limit: float | None) -> Array:
    return values if limit is None else np.minimum(values, values.dtype.type(limit))


def soft_capped(values: Array, limit: float | None) -> Array:
    assert limit is not None
    capped: Array = np.tanh(values / limit) * limit
    return capped


def normalize(results: Array, weights: Weights, kind: ExpertKind) -> Array:
    """Results `[rows, hidden]` of experts as they are added up: through the RMS norm, if the kind has one."""
    if kind.norm_eps is None:
        return results
    assert weights.result_scale is not None
    scaled = results * weights.result_scale.astype(results.dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        normalized: Array = scaled / np.sqrt((scaled * scaled).mean(axis=-1, keepdims=True) + kind.norm_eps)
    return normalized


def expert_ffn(
    x: Array, weights: Weights, expert_position: int, config: MoEConfig, kind: ExpertKind | None = None
) -> Array:
    """The result `[rows, hidden]`, float64, of one expert for `x` `[rows, hidden]`.

    Args:
        expert_position: index into the experts present in `weights` (the global index minus `first_expert`).
        kind: None: that of the config's experts.
    """
    kind = kind or config.expert_kind
    with np.errstate(invalid="ignore", over="ignore"):
        ups = [overflowed(linear(x, *up, expert_position), config.accumulator) for up in weights.ups]
        hidden = overflowed(activate(ups, kind), config.numpy_dtype)
        result = overflowed(linear(hidden, weights.down_proj, weights.down_bias, expert_position), config.numpy_dtype)
        return normalize(result, weights, kind)


def shared_ffn(x: Array, weights: Weights, config: MoEConfig) -> Array:
    """What the shared expert adds to `x` `[rows, hidden]`, float64: its result times its factor, if it has a gate.

    A factor of 0 adds nothing, whatever the result.
    """
    assert weights.shared is not None, "the config has a shared expert"
    result = expert_ffn(x, weights.shared, 0, config, config.shared_kind)
    if weights.shared_gate_weight is None:
        return result
    with np.errstate(invalid="ignore", over="ignore"):
        logits = linear(x, weights.shared_gate_weight[None, None], None, 0)
        factor = sigmoid(overflowed(logits, config.accumulator))
        added: Array = np.where(factor != 0, factor * result, 0)
    return added


def linear(
    x: Array, matrices: Array, biases: Array | None, place: int | tuple[int, slice], dtype: DTypeLike = np.float64
) -> Array:
    """`x @ matrices[place].T + biases[place]` in `dtype`; the place is an expert's, or some columns of its product."""
    product: Array = x.astype(dtype) @ matrices[place].astype(dtype).T
    return product if biases is None else product + biases[place].astype(dtype)
