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
from collections.abc import Sequence

import numpy as np

from .arrays import Array, overflowed
from .config import MoEConfig
from .layer_kinds import ACTIVATIONS, ExpertKind
from .weights import Weights


def activation(name: str, x: Array) -> Array:
    """One of `ACTIVATIONS`, elementwise, computed in float64 and rounded to the dtype of `x`.

    Within 8 units in the last place of the exact value in float64, and a little more than half a unit otherwise, where
    that is a normal number. Infinities give the limits of the formulas in IEEE arithmetic: silu(-inf) and gelu(-inf)
    are -inf * 0, NaN.

    Raises:
        ValueError: no such activation.
    """
    if name == "identity":
        return x
    if name == "relu":
        positive: Array = np.maximum(x, 0)
        return positive
    if name not in ("gelu", "silu"):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
    function = _gelu if name == "gelu" else _silu
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        value: Array = function(x.astype(np.float64)).astype(x.dtype)
    return value


def _silu(x: Array) -> Array:
    """x / (1 + exp(-x)); for negative x, x exp(x) / (1 + exp(x)) with exp(x) in two steps, as x exp(x) may be a normal
    number where exp(x) is not."""
    root = np.exp(-0.5 * np.abs(x))
    value: Array = x / (1 + root * root)
    return np.where(x < 0, value * root * root, value)


def _gelu(x: Array) -> Array:
    """x P(X < x) for a normal X: x tail(-x), or x - x tail(x), so that nothing cancels; tail(t) = mills root^2."""
    t = np.minimum(np.abs(x), _ZERO)
    high = t.astype(np.float32).astype(np.float64)  # its square is exact
    root = np.exp(-0.25 * high * high) * np.exp(-0.25 * (t - high) * (t + high))
    near, below = t < _FAR, np.minimum(x, _ZERO)
    below = np.where(near, below * (_erfc(t * 0.5**0.5) / 2), below * _mills(np.maximum(t, _FAR)) * root * root)
    return np.where(x > 0, x - below, below)


_FAR = 2.0  # from here on erfc(t / sqrt 2) would multiply the rounding of its argument by more than t^2
_ZERO = 80.0  # from here on root is 0


def _mills(t: Array) -> Array:
    """P(X > t) exp(t^2 / 2) for t >= _FAR, by Laplace's continued fraction 1/(t + 1/(t + 2/(t + 3/(t + ...))))."""
    value = t
    for n in range(100, 0, -1):
        value = t + n / value
    mills: Array = 1 / (value * (2 * np.pi) ** 0.5)
    return mills


def _erfc(x: Array) -> Array:
    """The complementary error function to the last bit or so, from the C library: about 60 ns per element."""
    values = np.fromiter(map(math.erfc, x.ravel().tolist()), np.float64, count=x.size)
    return values.reshape(x.shape)


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


def linear(x: Array, matrices: Array, biases: Array | None, position: int) -> Array:
    """`x @ matrices[position].T + biases[position]` in float64."""
    product: Array = x.astype(np.float64) @ matrices[position].astype(np.float64).T
    return product if biases is None else product + biases[position].astype(np.float64)
