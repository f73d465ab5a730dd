"""Functions of one number by arithmetic and exponentials alone, in the number's type: the same steps on all targets.

Whoever compiles them puts them through `jit`, so none calls another. Constants are made of 1 in that type: a literal
would make float64 of a float32. Within a few units in the last place.
"""

from __future__ import annotations

import math
from typing import Any


def sigmoid(x: Any, one: Any) -> Any:
    power = math.exp(-abs(x))  # it cannot overflow
    return (one if x >= 0 else power) / (one + power)


def softplus(x: Any, one: Any) -> Any:
    """log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), and log(1 + p) = 2 atanh(p / (2 + p)) by its series."""
    power = math.exp(-abs(x))
    s = power / (one + one + power)  # at most 1/3
    odd = one
    for _ in range(17):
        odd += one + one
    value = one / odd
    for _ in range(17):
        odd -= one + one
        value = one / odd + s * s * value
    rest = (s + s) * value
    return x + rest if x > 0 else rest


def soft_capped(x: Any, limit: Any) -> Any:
    """limit * tanh(x / limit): by Lambert's continued fraction near 0, where exponentials would cancel."""
    one, t = limit / limit, x / limit
    if abs(t) + abs(t) < one:
        odd = one
        for _ in range(8):
            odd += one + one
        value = odd
        for _ in range(8):
            odd -= one + one
            value = odd + t * t / value
        return limit * (t / value)
    power = math.exp(-abs(t + t))
    value = limit * ((one - power) / (one + power))
    return value if t > 0 else -value
