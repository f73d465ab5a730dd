"""One expert's feed-forward network in float64: what the tiles and kernels are compared with.

    plain   act(x W_up^T + b_up) W_down^T + b_down
    gated   (act(x W_gate^T + b_gate) * (x W_up^T + b_up)) W_down^T + b_down

Nothing is rounded on the way, but what leaves the range of the type that an implementation holds it in becomes
infinite, as rounding makes it: products with the up matrices in the accumulator's range, hidden rows and results in the
element type's. So oracle and kernel are infinite or NaN in the same places. Leaves out: sums that overflow on the way
and come back; clamped and scaled variants of gating.
"""

from __future__ import annotations

import math

import numpy as np

from .arrays import Array, overflowed
from .config import ACTIVATIONS, MoEConfig
from .weights import Weights


def activation(name: str, x: Array) -> Array:
    """One of `config.ACTIVATIONS`, elementwise, in the dtype of `x`.

    Raises:
        ValueError: no such activation.
    """
    if name == "identity":
        return x
    if name == "relu":
        positive: Array = np.maximum(x, 0)
        return positive
    if name == "gelu":
        normal_cdf: Array = (1 + _erf(x * 0.5**0.5)) / 2
        return x * normal_cdf
    if name == "silu":
        with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit
            silu: Array = x / (1 + np.exp(-x))
        return silu
    raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")


def _erf(x: Array) -> Array:
    """The error function to the last bit or so, from the C library: about 60 ns per element."""
    values = np.fromiter(map(math.erf, x.ravel().tolist()), np.float64, count=x.size)
    return values.reshape(x.shape).astype(x.dtype)


def expert_ffn(x: Array, weights: Weights, expert_position: int, config: MoEConfig) -> Array:
    """The result `[rows, hidden]`, float64, of one expert for `x` `[rows, hidden]`.

    Args:
        expert_position: index into the experts present in `weights` (the global index minus `first_expert`).
    """
    with np.errstate(invalid="ignore", over="ignore"):
        up = overflowed(linear(x, weights.up_proj, weights.up_bias, expert_position), config.accumulator)
        if weights.gate_proj is None:
            hidden = activation(config.activation, up)
        else:
            gate = linear(x, weights.gate_proj, weights.gate_bias, expert_position)
            hidden = activation(config.activation, overflowed(gate, config.accumulator)) * up
        hidden = overflowed(hidden, config.numpy_dtype)
        result = linear(hidden, weights.down_proj, weights.down_bias, expert_position)
        return overflowed(result, config.numpy_dtype)


def linear(x: Array, matrices: Array, biases: Array | None, position: int) -> Array:
    """`x @ matrices[position].T + biases[position]` in float64."""
    product: Array = x.astype(np.float64) @ matrices[position].astype(np.float64).T
    return product if biases is None else product + biases[position].astype(np.float64)
