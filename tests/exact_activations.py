"""What the activations are, by methods that no code of the project uses: far more digits than the type asked about.

And their slopes.
"""

import math
from decimal import Decimal, localcontext

import numpy as np
from cases import finfo

SQRT_2_PI = Decimal("2.506628274631000502415765284811045253006986740609938316629923576")


def to_50_digits(function):
    """`function`, of a Decimal, for a finite number, rounded to float64: some 50 us."""

    def exact(x):
        with localcontext(prec=60):
            return max(x, -0.0) if abs(x) > 1000 else float(function(Decimal(x)))

    return exact


def nearly_silu(x):
    """To 13 digits: exp of a number below zero cancels nothing."""
    power = math.exp(-abs(x))
    return x / (1 + power) * (1 if x > 0 else power)


def nearly_gelu_tanh(x):
    """To 13 digits, as t is below 200 where the result is not 0."""
    t = 2 * math.sqrt(2 / math.pi) * (abs(x) + 0.044715 * abs(x) ** 3) if abs(x) < 20 else 800.0
    return x / (1 + math.exp(-t)) * (1 if x > 0 else math.exp(-t))


def _gelu_tanh(d):
    near = max(d, Decimal(-60))  # from here down it is 0 whatever is added to 1
    return d / (1 + (-4 / SQRT_2_PI * (near + Decimal("0.044715") * near**3)).exp())


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


# By name: of a finite number to 13 digits; of one to the last digit of a float64; and limits of the formula in IEEE
# arithmetic, where they are not NaN: x / (1 + exp(-x)) at -inf is -inf / inf.
EXACT = {
    "relu": (lambda x: max(x, 0.0), lambda x: max(x, 0.0), {np.inf: np.inf, -np.inf: 0.0}),
    "gelu": (
        lambda x: x * math.erfc(-x * 0.5**0.5) / 2,
        to_50_digits(lambda d: d * (1 - _tail(d) if d > 0 else _tail(-d))),
        {np.inf: np.inf},
    ),
    "relu2": (lambda x: max(x, 0.0) * x, lambda x: max(x, 0.0) * x, {np.inf: np.inf, -np.inf: 0.0}),
    "gelu_tanh": (nearly_gelu_tanh, to_50_digits(_gelu_tanh), {np.inf: np.inf}),
    "silu": (nearly_silu, to_50_digits(lambda d: d / (1 + (-d).exp())), {np.inf: np.inf}),
}


def expected_values(name, x):
    """`[len(x)]` float64, infinities and NaN included; far more accurate than the dtype of `x`."""
    if name == "identity":
        return x.astype(np.float64)
    nearly, exact, limits = EXACT[name]
    one = exact if x.dtype == np.float64 else nearly
    return np.array([one(v) if math.isfinite(v) else limits.get(v, math.nan) for v in x.astype("f8").tolist()])


@np.errstate(invalid="ignore")  # casts of signalling NaN
def assert_within(name, x, got, most_ulps):
    """`got` has the dtype of `x`; the bound is in units of that, and below normal numbers half of the smallest one."""
    smallest = float(finfo(x.dtype).smallest_normal)
    expected, result = expected_values(name, x), got.astype(np.float64)
    with np.errstate(over="ignore"):  # only relu2 is larger than its argument
        expected = np.where(np.isinf(expected.astype(x.dtype)), np.copysign(np.inf, expected), expected)
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


def _logistic(d, t, rise):
    """s(t) and d s'(t) rise, where s is the logistic function and t has the slope rise."""
    s = 1 / (1 + (-t).exp())
    return s, d * s * s * (-t).exp() * rise


def _silu_terms(d):
    return _logistic(d, d, 1)


def _gelu_terms(d):
    below = _tail(abs(d))
    return 1 - below if d > 0 else below, d * (-d * d / 2).exp() / SQRT_2_PI


def _gelu_tanh_terms(d):
    factor = 4 / SQRT_2_PI
    near = max(min(d, Decimal(60)), Decimal(-60))
    rise = 1 + 3 * Decimal("0.044715") * near**2
    return _logistic(near, factor * (near + Decimal("0.044715") * near**3), factor * rise)


# By name: of a finite number two terms that the slope is the sum of, which may cancel; limits, where they are not NaN.
SLOPES = {
    "relu": (lambda d: (int(d > 0), 0), {np.inf: 1.0, -np.inf: 0.0}),
    "gelu": (_gelu_terms, {}),
    "relu2": (lambda d: (2 * max(d, 0), 0), {np.inf: np.inf, -np.inf: 0.0}),
    "gelu_tanh": (_gelu_tanh_terms, {}),
    "silu": (_silu_terms, {}),
}


def slope_terms(name, x):
    """`[2, len(x)]` float64 for finite x: the slope, and the sum of the sizes of its two terms."""
    found = []
    with localcontext(prec=60):
        for value in x.astype("f8").tolist():
            near = value if name == "relu2" else max(min(value, 1000.0), -1000.0)  # beyond, 0 or 1 to all digits
            first, second = SLOPES[name][0](Decimal(near))
            found.append((float(first + second), float(abs(first) + abs(second))))
    return np.array(found).reshape(-1, 2).T


@np.errstate(invalid="ignore")  # casts of signalling NaN
def assert_slopes_within(name, x, got, roundings):
    """As `assert_within`, in unit roundoffs of the terms' sizes."""
    smallest, finite = float(finfo(x.dtype).smallest_normal), np.isfinite(x)
    limits = np.array([SLOPES[name][1].get(v, np.nan) for v in x[~finite].astype("f8").tolist()])
    np.testing.assert_array_equal(got[~finite].astype("f8"), limits, f"slope of {name} at {x[~finite]}")
    expected, size = slope_terms(name, x[finite])
    with np.errstate(over="ignore"):
        expected = np.where(np.isinf(expected.astype(x.dtype)), np.inf, expected)
    bound = np.where(size >= smallest, roundings * finfo(x.dtype).eps / 2 * size, smallest)
    same = got[finite] == expected
    excess = np.where(same, 0, np.abs(np.where(same, 0, got[finite] - expected)) / bound)
    at = excess.argmax()
    assert excess.max() <= 1, (
        f"slope of {name} at {x[finite][at]!r}: {got[finite][at]!r}, expected {expected[at]!r}: "
        f"{excess.max():.3g} times the bound, and {(excess > 1).sum()} more"
    )
