"""The tolerance passes honest float32 chains and 16-bit rounding, and fails small real faults."""

import numpy as np
import pytest

from reference import MoEConfig, Weights, activation, expert_ffn, max_rel_error, moe_layer, tolerance


def test_max_rel_error():
    ref = np.array([[1.0, -4.0], [2.0, 0.0]])
    assert max_rel_error(ref + np.array([[0, 0.5], [0, 0]]), ref) == 0.125
    assert max_rel_error([ref[:1], ref[1:] + 1], [ref[:1], ref[1:]]) == 0.25
    assert max_rel_error(np.full((1, 2), 0.5), np.zeros((1, 2))) == 0.5
    assert max_rel_error(np.empty((0, 3)), np.empty((0, 3))) == 0
    with pytest.raises(ValueError, match=r"same shape, got \[1, 2\] and \[2, 2\]"):
        max_rel_error(ref[:1], ref)


def test_rows_must_be_finite_in_both_or_in_neither():
    ref = np.array([[1.0, np.nan], [2.0, 0.0]])
    assert max_rel_error(np.array([[np.inf, 7.0], [2.0, 0.5]]), ref) == 0.25
    assert max_rel_error(np.array([[1.0, 7.0], [2.0, 0.0]]), ref) == np.inf
    assert max_rel_error(np.array([[np.nan, 7.0], [2.0, np.nan]]), ref) == np.inf


def chain_expert(x, w, e, config):
    """A kernel's arithmetic: float32 sums, element after element; hidden and result rounded to the element type."""

    def product(a, b):
        total = np.zeros((len(a), len(b)), np.float32)
        for k in range(a.shape[1]):
            total += a[:, k, None].astype(np.float32) * b[:, k].astype(np.float32)
        return total

    hidden = activation("silu", product(x, w.gate_proj[e])) * product(x, w.up_proj[e])
    return product(hidden.astype(config.numpy_dtype), w.down_proj[e]).astype(config.numpy_dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_chain_is_inside_and_a_missing_product_outside(dtype):
    sizes = dict(num_ranks=1, num_tokens=65, hidden=255, ffn=301, num_experts=2, num_topk=1)
    config = MoEConfig(**sizes, gated=True, activation="silu", dtype=dtype)
    w = Weights.random(config)
    x = np.random.default_rng(0).standard_normal((65, 255)).astype(config.numpy_dtype)
    ref = expert_ffn(x, w, 0, config)
    error = max_rel_error(chain_expert(x, w, 0, config), ref)
    assert tolerance(config) / 30 < error < tolerance(config) / 2
    shorter = x.copy()
    shorter[:, 200] = 0  # one product of 255 is missing
    assert max_rel_error(chain_expert(shorter, w, 0, config), ref) > tolerance(config)


def test_wrong_layers_are_outside():
    config = MoEConfig(num_ranks=1, num_tokens=40, hidden=64, ffn=33, num_experts=8, num_topk=2, dtype="bfloat16")
    weights, x = Weights.random(config), np.random.default_rng(0).standard_normal((40, 64))
    ref = moe_layer(x, weights, config)
    one_expert_less = moe_layer(x, weights, MoEConfig(**(config.__dict__ | {"num_topk": 1})))
    assert max_rel_error(one_expert_less, ref) > tolerance(config)
    other_gelu = moe_layer(x, weights, MoEConfig(**(config.__dict__ | {"activation": "silu"})))
    assert max_rel_error(other_gelu, ref) > tolerance(config)


@pytest.mark.parametrize(("dtype", "low", "high"), [
    ("float64", 1e-15, 1e-13), ("float32", 1e-6, 1e-4), ("float16", 1e-3, 1e-2), ("bfloat16", 1e-2, 5e-2),
])  # fmt: skip
def test_sizes(dtype, low, high):
    config = MoEConfig(num_ranks=1, num_tokens=1, hidden=512, ffn=1024, num_experts=2, num_topk=1, dtype=dtype)
    assert low < tolerance(config) < high
