"""The yardstick of an element is the sum of its terms' sizes, whatever their signs."""

import numpy as np
import pytest

from reference import MoEConfig, Weights, moe_layer
from reference.error_bounds import absolute_terms, smallest, underflow
from reference.tolerance import tolerance

SIZES = dict(num_ranks=1, num_tokens=3, hidden=3, ffn=2, num_experts=3, num_topk=2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_terms_are_added_without_their_signs(gated, bias):
    config = MoEConfig(**SIZES, gated=gated, activation="relu", dtype="float64")
    w, rng = Weights.random(config, seed=1, bias=bias), np.random.default_rng(2)
    x, idx = rng.standard_normal((2, 3)), np.array([[0, 2], [1, -1]])
    factors = np.array([[0.5, -0.25], [1.0, np.nan]])
    expected = np.zeros((2, 3))
    for t, h in np.ndindex(2, 3):
        for j in range(2):
            e = idx[t, j]
            if e >= 0:
                hidden = [up(x[t], w.up_proj, w.up_bias, e, f) for f in range(2)]
                if gated:
                    hidden = [hidden[f] * up(x[t], w.gate_proj, w.gate_bias, e, f) for f in range(2)]
                result = up(np.array(hidden), w.down_proj, w.down_bias, e, h)
                expected[t, h] += abs(factors[t, j]) * result
    (terms,) = absolute_terms([x], w, config, [idx], [factors])
    np.testing.assert_allclose(terms, expected, rtol=1e-12)
    (y,) = moe_layer([x], w, config, [idx], [factors])
    assert (np.abs(y) <= terms * (1 + 1e-12)).all() and (np.abs(y) < terms / 2).any()


def up(row, matrices, biases, e, out):
    return sum(abs(a * b) for a, b in zip(row, matrices[e, out], strict=True)) + (
        0 if biases is None else abs(biases[e, out])
    )


@pytest.mark.parametrize(
    ("dtype", "exponent"), [("float16", -24), ("bfloat16", -133), ("float32", -149), ("float64", -1074)]
)
def test_near_zero_an_error_is_some_subnormal_steps(dtype, exponent):
    config = MoEConfig(**SIZES, dtype=dtype)
    assert smallest(config.numpy_dtype) == 2.0**exponent
    sums = 2 * 3 * 2 * (2.0**exponent if dtype in ("float32", "float64") else 2.0**-149)
    assert underflow(config) == 2.0**exponent * (2 + 2 * 2) + sums


def test_more_roundings_allow_more_in_halves_and_hardly_more_in_floats():
    config = {dtype: MoEConfig(**(SIZES | dict(hidden=512, ffn=512)), dtype=dtype) for dtype in ("bfloat16", "float32")}
    more = {dtype: tolerance(each, 12) / tolerance(each) for dtype, each in config.items()}
    assert more["bfloat16"] == pytest.approx(2, rel=1e-3) and 1 < more["float32"] < 1.01
