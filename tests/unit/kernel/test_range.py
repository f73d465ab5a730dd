"""Where values leave the range of their type, kernel, tiles and oracle are infinite or NaN in the same places."""

import numpy as np
import pytest
from cases import random_tokens, tiny_config

from flashmoe_numba import FlashMoE
from reference import TiledLayer, Weights, moe_layer

INF, NAN = np.inf, np.nan


def scaling_experts(config, up, down, column):
    """Expert e maps a row to up[e] times its first element, then to down[e] times that; `column` of the result is 0."""
    weights = Weights.random(config)
    weights.up_proj[:], weights.down_proj[:] = 0, 0
    weights.up_proj[:, 0, 0] = up
    weights.down_proj[:, :, 0] = np.array(down, config.numpy_dtype)[:, None]
    weights.down_proj[:, column, 0] = 0
    return weights


# expert 1: the result overflows, 2: the hidden row, 3: the hidden row, to the other side
CASES = [  # first element of x, experts, weights, what a result column is, what the one is in which `down` is 0
    (300, (1, 0), (0.25, 1), INF, 0),  # not 18750 + 300: rounded before it is weighted
    (300, (1, 0), (0, 1), 300, 0),
    (300, (2, 3), (0.5, 0.5), NAN, NAN),  # inf - inf
    (300, (0, 3), (1, 2), -INF, NAN),  # -inf * 0
    (300, (3, 2), (0, -0.0), 0, 0),
    (300, (1, -1), (-0.5, NAN), -INF, 0),
    (262, (1, 4), (0.25, INF), 16375, 0),  # 65,500 is in the range
    (300, (-1, 4), (1, 1), 0, 0),
    (300, (2, -1), (0, NAN), 0, 0),
    (2, (2, 1), (1, 0.5), 255, 0),
    (1, (0, 1), (NAN, 0), NAN, NAN),  # a given NaN at a choice goes to its row
]


@pytest.mark.parametrize("backend", ["cpu", "fibers"])
def test_float16_results_overflow_before_they_are_weighted(backend):
    config = tiny_config(num_tokens=len(CASES), dtype="float16", gated=False, activation="identity")
    weights = scaling_experts(config, up=[1, 1, 250, -250], down=[1, 250, 0.01, 0.01], column=3)
    first, idx, factors, expected, expected_3 = (np.array(part) for part in zip(*CASES, strict=True))
    x = [np.zeros((len(CASES), config.hidden), np.float16), np.zeros((0, config.hidden), np.float16)]
    x[0][:, 0] = first
    routing = dict(topk_idx=[idx, idx[:0]], topk_weights=[factors, factors[:0]])
    with FlashMoE(config, weights, backend=backend, num_processors=1) as layer:
        y, stats, used = layer(x, **routing)[0], layer.stats, layer.routing[0]
    others = {
        "oracle": moe_layer(x, weights, config, **routing)[0],
        "tiles": TiledLayer(x, weights, config, **routing).run(np.random.default_rng(0))[0],
    }
    for name, rows in {"kernel": y, **others}.items():
        np.testing.assert_allclose(rows[:, 0].astype(float), expected, rtol=1e-3, err_msg=name)
        np.testing.assert_allclose(rows[:, 3].astype(float), expected_3, rtol=1e-3, err_msg=name)
    assert used.topk_idx.tolist() == np.where(idx < 4, idx, -1).tolist()
    # rows of infinite results: one of case 0 and of 1, both of 2, one of 3, both of 4, one of 5 and of 8
    assert [s.nonfinite_rows for s in stats] == [9, 0] and [s.nonfinite_tokens for s in stats] == [1, 0]
    assert [s.dropped_pairs for s in stats] == [0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_a_gated_expert_overflow_alone(dtype):
    """Gate times up would be in the range, but one of them is not: experts 0 and 1. Expert 2's is 0 times inf."""
    config = tiny_config(dtype=dtype, activation="relu")
    weights = scaling_experts(config, up=[1e20, 1e-30, 1e20, 1e-20], down=[1, 1, 1, 1], column=3)
    weights.gate_proj[:] = 0
    weights.gate_proj[:, 0, 0] = [1e-30, 1e20, -1, 1e-20]
    x = [np.zeros((4, config.hidden), config.numpy_dtype), np.zeros((0, config.hidden), config.numpy_dtype)]
    x[0][:, 0] = 1e20
    idx, factors = np.array([[0, -1], [1, -1], [2, -1], [3, -1]]), np.ones((4, 2))
    routing = dict(topk_idx=[idx, idx[:0]], topk_weights=[factors, factors[:0]])
    with FlashMoE(config, weights, backend="fibers", num_processors=1, lanes=1) as layer:
        kernel = layer(x, **routing)[0]
    oracle = moe_layer(x, weights, config, **routing)[0]
    for rows in (kernel, oracle):
        np.testing.assert_allclose(rows[:, 0].astype(float), [INF, INF, NAN, 1], rtol=0.02)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e20), ("bfloat16", 1e20), ("float64", 1e160)])
def test_logits_beyond_the_accumulator_spoil_their_token_and_are_counted(dtype, size):
    """They would be finite in a wider type; oracle and kernel say the same."""
    config = tiny_config(dtype=dtype)
    weights, x = Weights.random(config), random_tokens(config)
    weights.router[:, 0], weights.router[2, 0] = 0, size
    for part in x:
        part[:, 0] = 0
    x[0][3, 0], x[1][5, 0] = size, -size  # the second one's is -inf, which is no harm to it
    with FlashMoE(config, weights, backend="fibers", num_processors=1, lanes=1) as layer:
        y, routing, stats = layer(x), layer.routing, layer.stats
    assert routing[0].topk_idx[3].tolist() == [0, 1] and np.isnan(routing[0].topk_weights[3]).all()
    assert 2 not in routing[1].topk_idx[5] and np.isfinite(routing[1].topk_weights).all()
    assert [s.nonfinite_tokens for s in stats] == [1, 0]
    for got, expected in zip(y, moe_layer(x, weights, config), strict=True):
        assert (np.isnan(got) == np.isnan(expected)).all()
    assert np.isnan(y[0][3]).all() and np.isfinite(y[0][:3].astype(float)).all()
