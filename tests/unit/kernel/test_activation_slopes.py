"""Slopes of activations: the definition and the formula of kernels, against far more digits."""

from functools import cache

import numpy as np
import pytest
from cases import assert_same_bits
from exact_activations import SLOPES, assert_slopes_within
from numba import njit

from flashmoe_numba.device.cpu import JIT_OPTIONS
from flashmoe_numba.tile_gemm.cpu_activations import exp32, exp64
from reference import ACTIVATIONS, activation
from reference.activations import FILES, MOST_SLOPE_ROUNDINGS, activation_slope

REALS = {np.float32: exp32, np.float64: exp64}
INLINED = njit(forceinline=True, **JIT_OPTIONS)


def inputs(real):
    """Some of every exponent, more where terms cancel or a formula changes, and the ends."""
    rng, info = np.random.default_rng(0), np.finfo(real)
    sizes = np.exp2(rng.uniform(info.minexp, info.maxexp, 100))
    ranges = [(-6, 6, 300), (-40, 14, 200), (-760, 0, 100), (-1.3, -0.7, 100)]
    dense = [rng.uniform(*bounds, count) for *bounds, count in ranges]
    ends = [13.2, 14, 15, 18.8, 20, 22.5, 28, 39, 53.3, 58.5, 80, 88.1, 176, 709, 1418]
    edges = np.array([0, np.inf, info.max, 2, *ends])
    with np.errstate(over="ignore", invalid="ignore"):
        around = np.concatenate([edges, np.nextafter(edges.astype(real), real(0)), np.nextafter(edges.astype(real), 2)])
        return np.concatenate([sizes, -sizes, *dense, around, -around, [np.nan]]).astype(real)


@cache
def compiled(name, real):
    """A loop over elements, as kernels have it."""
    formula = FILES[name].make_slope(real, INLINED, REALS[real])

    @njit(**JIT_OPTIONS)
    def loop(x, y):
        for i in range(x.size):
            y[i] = formula(x[i])

    return loop


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("real", REALS)
def test_formulas_are_accurate(real, name):
    """Compiled with the exponential of CPUs, and interpreted with that of a library, as GPUs have it."""
    x = inputs(real)
    y, few = np.empty_like(x), x[::3]
    compiled(name, real)(x, y)
    assert_slopes_within(name, x, y, MOST_SLOPE_ROUNDINGS)
    formula = FILES[name].make_slope(real, lambda function: function, lambda v: real(np.exp(v)))
    with np.errstate(all="ignore"):
        interpreted = np.array([formula(v) for v in few], real)
    assert interpreted.dtype == real
    assert_slopes_within(name, few, interpreted, MOST_SLOPE_ROUNDINGS)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("real", REALS)
def test_the_definition_is_accurate(real, name):
    x = inputs(real)
    y = activation_slope(name, x)
    assert y.dtype == real
    assert_slopes_within(name, x, y, 16 if real is np.float64 else 1.001)


@pytest.mark.parametrize("name", FILES)
def test_loops_of_formulas_are_vectorised(name):
    """Arithmetic on vectors, and no call, in what LLVM made of the loop."""
    loop = compiled(name, np.float32)
    loop(np.ones(9, np.float32), np.empty(9, np.float32))
    (text,) = loop.inspect_llvm().values()
    body = text[text.index("vector.body") :]
    arithmetic = "fcmp" if name == "relu" else "fadd" if name == "relu2" else "fdiv"
    assert any(f" {arithmetic} " in line and " x float>" in line for line in body.splitlines()), body[:2000]


@pytest.mark.parametrize("name", SLOPES)
def test_a_slope_is_that_of_the_activation(name):
    x = np.linspace(-5, 5, 2001) + 1e-3
    step = 1e-5
    rise = (activation(name, x + step) - activation(name, x - step)) / (2 * step)
    np.testing.assert_allclose(activation_slope(name, x), rise, rtol=1e-8, atol=1e-9)


def test_every_activation_has_a_slope():
    assert set(SLOPES) == set(FILES) == set(ACTIVATIONS) - {"identity"}
    assert_same_bits(activation_slope("identity", np.array([-2.0, np.nan])), np.ones(2))
    assert [activation_slope(name, np.zeros(1))[0] for name in ("relu", "relu2", "silu", "gelu")] == [0, 0, 0.5, 0.5]
