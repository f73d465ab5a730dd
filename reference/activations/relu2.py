"""relu2(x) = max(x, 0)^2 (So et al., Primer, 2021); of NaN it is NaN."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import Array
from .exponential import Compile, Formula


def exact(x: Array) -> Array:
    positive = np.where(x < 0, 0.0, x)
    return positive * positive


def exact_slope(x: Array) -> Array:
    return 2 * np.where(x < 0, 0.0, x)


def make(real: Any, compiled: Compile, exp: Formula) -> Formula:
    zero = real(0)

    def relu2(x: Any) -> Any:
        positive = x if not x < zero else zero
        return positive * positive

    return compiled(relu2)


def make_slope(real: Any, compiled: Compile, exp: Formula) -> Formula:
    zero = real(0)

    def relu2_slope(x: Any) -> Any:
        positive = x if not x < zero else zero
        return positive + positive

    return compiled(relu2_slope)
