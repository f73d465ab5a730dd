"""What the activations are, by methods that no code of the project uses: far more digits than the type asked about."""

import math
from decimal import Decimal, localcontext

import numpy as np
from cases import finfo

SPECIAL = {  # limits of the formulas in IEEE arithmetic: x / (1 + exp(-x)) at -inf is -inf / inf
    "relu": {np.inf: np.inf, -np.inf: 0.0},
    "gelu": {np.inf: np.inf},
    "silu": {np.inf: np.inf},
}
SQRT_2_PI = Decimal("2.506628274631000502415765284811045253006986740609938316629923576")


def exact(name, x):
    """`activation(x)` of a finite number to 50 digits, rounded to float64: some 50 us."""
    with localcontext(prec=60):
        d = Decimal(x)
        if abs(d) > 1000:
            return max(x, -0.0)
        return float(d / (1 + (-d).exp()) if name == "silu" else d * (1 - _tail(d) if d > 0 else _tail(-d)))


def nearly(name, x):
    """`activation(x)` of a finite number to 13 digits: exp and erfc of numbers below zero cancel nothing."""
    if name == "silu":
        power = math.exp(-abs(x))
        return x / (1 + power) * (1 if x > 0 else power)
    return x * math.erfc(-x * 0.5**0.5) / 2


def _tail(t):
    """P(X > t) of a normal X, t >= 0: by its power series, and from 6 on by Laplace's continued fraction."""
    density = (-t * t / 2).exp() / SQRT_2_PI
    if t >= 6:
        fraction = t
        for n in range(150, 0, -1):
            fraction = t + n / fraction
        return density / fraction
    term, total, n = t, Decimal(0), 1
    while total + term != total:
        total, n = total + term, n + 2
        term *= t * t / n
    return Decimal("0.5") - density * total


def expected_values(name, x):
    """`[len(x)]` float64, infinities and NaN included; far more accurate than the dtype of `x`."""
    if name == "identity":
        return x.astype(np.float64)
    one = {"relu": lambda _, v: max(v, 0.0), "silu": nearly, "gelu": nearly}[name]
    one = exact if x.dtype == np.float64 and name != "relu" else one
    special = SPECIAL[name]
    return np.array([one(name, v) if math.isfinite(v) else special.get(v, math.nan) for v in x.astype("f8").tolist()])


@np.errstate(invalid="ignore")  # casts of signalling NaN
def assert_within(name, x, got, most_ulps):
    """`got` has the dtype of `x`; the bound is in units of that, and below normal numbers half of the smallest one."""
    smallest = float(finfo(x.dtype).smallest_normal)
    expected, result = expected_values(name, x), got.astype(np.float64)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(result[~finite], expected[~finite], f"{name} of {x[~finite]}")
    size = np.abs(expected[finite])
    unit = 2.0 ** (np.floor(np.log2(np.maximum(size, smallest))) - finfo(x.dtype).nmant)
    bound = np.where(size >= smallest, most_ulps * unit, smallest / 2)
    excess = np.abs(result[finite] - expected[finite]) / bound
    at = np.flatnonzero(finite)[excess.argmax()]
    assert excess.max() <= 1, (
        f"{name}({x[at]!r}) = {got[at]!r}, expected {expected[at]!r}: {excess.max():.3g} times the bound, "
        f"and {(excess > 1).sum()} more"
    )
