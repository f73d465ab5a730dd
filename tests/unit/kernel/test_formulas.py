"""Formulas by exponentials alone, interpreted and compiled, against the C library in extended precision."""

import numpy as np
import pytest
from numba import njit

from flashmoe_numba.device import formulas
from flashmoe_numba.device.cpu import JIT_OPTIONS

MOST_ULPS = 6


def values(real):
    """Some of every size, both signs, ends, and around where a formula changes."""
    rng = np.random.default_rng(0)
    sizes = np.concatenate([np.exp2(rng.uniform(-30, 7, 3000)), rng.uniform(0.4, 0.6, 200), rng.uniform(15, 50, 300)])
    return np.concatenate([sizes, -sizes, [0.0, -0.0, np.inf, -np.inf, np.nan]]).astype(real)


EXACT = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
    "soft_capped": lambda x: 1.5 * np.tanh(x / 1.5),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("real", [np.float32, np.float64])
@pytest.mark.parametrize("compile_it", [lambda f: f, njit(**JIT_OPTIONS)], ids=["interpreted", "compiled"])
def test_a_formula_is_accurate(name, real, compile_it):
    function, second = compile_it(getattr(formulas, name)), real(1.5 if name == "soft_capped" else 1)
    x = values(real)
    with np.errstate(all="ignore"):
        got = np.array([function(value, second) for value in x], real)
        expected = EXACT[name](x.astype(np.longdouble))
    finite = np.isfinite(x)
    np.testing.assert_array_equal(got[~finite], expected[~finite].astype(real))
    off = np.abs(got[finite] - expected[finite]) / np.spacing(np.abs(expected[finite]).astype(real))
    normal = np.abs(expected[finite]) >= np.finfo(real).smallest_normal
    assert off[normal].max() <= MOST_ULPS, f"{x[finite][normal][off[normal].argmax()]!r}: {off[normal].max()} ulps"
