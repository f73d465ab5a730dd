"""One expert's feed-forward network in float64: what the tiles and kernels are compared with.

    plain   act(x W_up^T + b_up) W_down^T + b_down
    gated   (act(x W_gate^T + b_gate) * (x W_up^T + b_up)) W_down^T + b_down

Nothing is rounded on the way, but what leaves the range of the type that an implementation holds it in becomes
infinite, as rounding makes it: products with the up matrices in the accumulator's range, hidden rows and results in the
element type's. So oracle and kernel are infinite or NaN in the same places. Leaves out: sums that overflow on the way
and come back; clamped and scaled variants of gating.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from .activations import activation
from .arrays import Array, overflowed
from .config import MoEConfig
from .layer_kinds import ExpertKind
from .weights import Weights


def activate(products: Sequence[Array], kind: ExpertKind) -> Array:
    """The rows between the two products; `products` are those with the up matrices, as `Weights.ups` has them."""
    first = activation(kind.activation, products[0])
    return first * products[1] if kind.gated else first


def expert_ffn(x: Array, weights: Weights, expert_position: int, config: MoEConfig) -> Array:
    """The result `[rows, hidden]`, float64, of one expert for `x` `[rows, hidden]`.

    Args:
        expert_position: index into the experts present in `weights` (the global index minus `first_expert`).
    """
    with np.errstate(invalid="ignore", over="ignore"):
        ups = [overflowed(linear(x, *up, expert_position), config.accumulator) for up in weights.ups]
        hidden = overflowed(activate(ups, config.expert_kind), config.numpy_dtype)
        result = linear(hidden, weights.down_proj, weights.down_bias, expert_position)
        return overflowed(result, config.numpy_dtype)


def shared_ffn(x: Array, weights: Weights, config: MoEConfig) -> Array:
    """What the shared expert adds to `x` `[rows, hidden]`, float64: its result times its factor, if it has a gate.

    A factor of 0 adds nothing, whatever the result.
    """
    assert weights.shared is not None, "the config has a shared expert"
    result = expert_ffn(x, weights.shared, 0, config)
    if weights.shared_gate_weight is None:
        return result
    with np.errstate(invalid="ignore", over="ignore"):
        logits = linear(x, weights.shared_gate_weight[None, None], None, 0)
        factor = sigmoid(overflowed(logits, config.accumulator))
        added: Array = np.where(factor != 0, factor * result, 0)
    return added


def sigmoid(logits: Array) -> Array:
    """`1 / (1 + exp(-logits))` in their dtype, 0 where the exponential overflows."""
    with np.errstate(over="ignore"):
        factors: Array = 1 / (1 + np.exp(-logits))
    return factors


def linear(
    x: Array, matrices: Array, biases: Array | None, place: int | tuple[int, slice], dtype: DTypeLike = np.float64
) -> Array:
    """`x @ matrices[place].T + biases[place]` in `dtype`; the place is an expert's, or some columns of its product."""
    product: Array = x.astype(dtype) @ matrices[place].astype(dtype).T
    return product if biases is None else product + biases[place].astype(dtype)
