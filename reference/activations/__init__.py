"""Activations, one file each, beside `identity`, which has none: what they mean, and how kernels compute them.

A file has `exact(x)`, elementwise in float64, within 8 units in the last place where the result is a normal number; and
`make(real, compiled, exp)`, its formula in plain arithmetic of one type `real`, float32 or float64, without a branch
that compilers cannot make a choice of, so that loops of it are vectorised. `compiled` is what each function of the
formula is put through, and `exp` the target's exponential function. A formula is within MOST_ULPS units in the last
place where the result is a normal number, below that off by less than the smallest normal number, and at infinities,
NaN and zeros what the definition's limits are in IEEE arithmetic. Multiply-adds that a compiler fuses do no harm.

Of the derivative it has the same: `exact_slope(x)` and `make_slope(real, compiled, exp)`. With act(x) = x s(x), where s
rises from 0 to 1, that is s(x) + x s'(x), of which the two terms cancel at one x below 0. So it is off by 8 units in
the last place of |s| + |x s'|, or by MOST_SLOPE_ROUNDINGS unit roundoffs u of that, and by less than the smallest
normal number below that. Each file adds up its roundings: of an exponential within two units, which are 4 u, and 1 u
each. At infinities x s' is inf * 0, NaN, but in relu and relu2.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from ..arrays import Array
from ..scalars import check_one_of
from . import gelu, gelu_tanh, relu, relu2, silu

FILES: dict[str, ModuleType] = {"relu": relu, "gelu": gelu, "silu": silu, "relu2": relu2, "gelu_tanh": gelu_tanh}
ACTIVATIONS = ("identity", *FILES)  # kernels know them by their index
MOST_ULPS = 7.0
MOST_SLOPE_ROUNDINGS = 24.0


def activation(name: str, x: Array) -> Array:
    """One of `ACTIVATIONS`, elementwise, computed in float64 and rounded to the dtype of `x`.

    Raises:
        ValueError: no such activation.
    """
    x = np.asarray(x)
    if name == "identity":
        return x
    check_one_of("activation", name, ACTIVATIONS)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        value: Array = FILES[name].exact(x.astype(np.float64)).astype(x.dtype)
    return value


def activation_slope(name: str, x: Array) -> Array:
    """The derivative of one of `ACTIVATIONS`, elementwise, computed in float64 and rounded to the dtype of `x`.

    At 0, where relu has none, it is 0.

    Raises:
        ValueError: no such activation.
    """
    x = np.asarray(x)
    if name == "identity":
        return np.ones_like(x)
    check_one_of("activation", name, ACTIVATIONS)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        value: Array = FILES[name].exact_slope(x.astype(np.float64)).astype(x.dtype)
    return value


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), elementwise, in the dtype of `x`."""
    with np.errstate(over="ignore"):
        value: Array = 1 / (1 + np.exp(-x))
    return value


def sigmoid_slope(x: Array) -> Array:
    """The derivative of sigmoid, elementwise, in the dtype of `x`: without a difference that cancels."""
    power = np.exp(-np.abs(x))
    value: Array = power / (1 + power) ** 2
    return value


def capped_slope(x: Array, cap: float) -> Array:
    """The derivative of `cap * tanh(x / cap)`, elementwise, in the dtype of `x`."""
    return 4 * sigmoid_slope(2 * (x / cap))
