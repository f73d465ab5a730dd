"""The oracle against a loop over tokens that shares no code with it, and what it promises on the edges."""

import math

import numpy as np
import pytest

from reference import MoEConfig, Weights, activation, expert_ffn, moe_layer


def make_config(**fields):
    sizes = dict(
        num_ranks=2, num_tokens=13, hidden=17, ffn=11, num_experts=6, num_topk=2, gated=True, activation="silu"
    )
    return MoEConfig(**(sizes | fields))


def make_x(config, seed=0, counts=None):
    rng = np.random.default_rng(seed)
    counts = [config.num_tokens] * config.num_ranks if counts is None else counts
    return [rng.standard_normal((count, config.hidden)).astype(config.numpy_dtype) for count in counts]


def naive_activation(name, z):
    if name == "silu":
        return z / (1 + math.exp(-z))
    if name == "gelu":
        return 0.5 * z * (1 + math.erf(z / math.sqrt(2)))
    return max(z, 0.0) if name == "relu" else z


def naive_expert(row, w, e, config):
    act = lambda v: np.array([naive_activation(config.activation, float(z)) for z in v])  # noqa: E731
    up = w.up_proj[e].astype(np.float64) @ row + (0 if w.up_bias is None else w.up_bias[e].astype(np.float64))
    if config.gated:
        gate = w.gate_proj[e].astype(np.float64) @ row
        up = act(gate + (0 if w.gate_bias is None else w.gate_bias[e].astype(np.float64))) * up
    else:
        up = act(up)
    return w.down_proj[e].astype(np.float64) @ up + (0 if w.down_bias is None else w.down_bias[e].astype(np.float64))


def naive_routing(row, w, config):
    logits = [math.fsum(float(a) * float(b) for a, b in zip(row, r, strict=True)) for r in w.router]
    chosen = sorted(range(config.num_experts), key=lambda e: (-logits[e], e))[: config.num_topk]
    p = [math.exp(z - max(logits)) for z in logits]
    total = sum(p[e] for e in chosen) if config.renormalize else sum(p)
    return [(e, p[e] / total) for e in chosen]


def naive_source(tokens, w, config, routing=None):
    used, y = dict.fromkeys(range(config.num_experts), 0), np.zeros((len(tokens), config.hidden))
    for t, row in enumerate(tokens.astype(np.float64)):
        for e, weight in naive_routing(row, w, config) if routing is None else routing[t]:
            used[e] += 1
            if config.capacity is None or used[e] <= config.capacity:
                y[t] += weight * naive_expert(row, w, e, config)
    return y


CASES = [
    {},
    {"gated": False, "activation": "gelu", "renormalize": False},
    {"capacity": 3, "activation": "relu"},
    {"capacity": 1, "num_topk": 6},
    {"num_topk": 1, "num_ranks": 6, "activation": "identity"},
    {"dtype": "bfloat16"},
    {"dtype": "float16", "gated": False},
    {"dtype": "float64", "renormalize": False, "num_ranks": 1, "num_tokens": 1},
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_equals_a_loop_over_tokens(case, bias):
    config = make_config(**case)
    weights, x = Weights.random(config, seed=3, bias=bias), make_x(config)
    for y, tokens in zip(moe_layer(x, weights, config), x, strict=True):
        np.testing.assert_allclose(y, naive_source(tokens, weights, config), rtol=1e-12, atol=1e-12)


def test_each_bias_is_used_alone():
    config = make_config()
    full, x = Weights.random(config, bias=True), make_x(config)[0]
    for name in ("up_bias", "gate_bias", "down_bias"):
        arrays = {n: getattr(full, n) for n in ("router", "up_proj", "down_proj", "gate_proj", name)}
        weights = Weights(**arrays)
        np.testing.assert_allclose(
            moe_layer(x, weights, config), naive_source(x, weights, config), rtol=1e-12, atol=1e-12
        )


def test_forms_of_x_agree_bit_for_bit():
    config = make_config(capacity=4)
    weights, x = Weights.random(config), make_x(config)
    as_list, as_array = moe_layer(x, weights, config), moe_layer(np.stack(x), weights, config)
    assert isinstance(as_list, list) and as_array.shape == (2, 13, 17)
    np.testing.assert_array_equal(np.stack(as_list), as_array)
    np.testing.assert_allclose(moe_layer(x[1], weights, config), as_list[1], rtol=1e-13, atol=1e-15)


def test_different_token_counts_and_none_on_a_rank():
    config = make_config(capacity=2)
    weights, x = Weights.random(config), make_x(config, counts=[0, 7])
    y = moe_layer(x, weights, config)
    assert y[0].shape == (0, 17)
    np.testing.assert_allclose(y[1], naive_source(x[1], weights, config), rtol=1e-12, atol=1e-12)


def test_flat_input_may_be_longer_than_num_tokens_and_drops_nothing_without_capacity():
    config = make_config(num_tokens=2)
    weights, x = Weights.random(config), np.random.default_rng(0).standard_normal((19, 17))
    np.testing.assert_allclose(moe_layer(x, weights, config), naive_source(x, weights, config), rtol=1e-12, atol=1e-12)


def test_external_routing_with_drops_and_a_token_that_loses_all():
    config = make_config(num_ranks=1, num_tokens=5, capacity=2, dtype="float64")
    weights, x = Weights.random(config), make_x(config)[0]
    idx = np.array([[0, 1], [1, 0], [0, 1], [2, 0], [5, 4]])
    factors = np.array([[0.5, 2.0], [1.0, 0.0], [3.0, 1.0], [0.25, 9.0], [-1.0, 0.5]])
    y = moe_layer(x, weights, config, idx, factors)
    routing = [list(zip(i, w, strict=True)) for i, w in zip(idx.tolist(), factors.tolist(), strict=True)]
    np.testing.assert_allclose(y, naive_source(x, weights, config, routing), rtol=1e-12, atol=1e-12)
    assert not y[2].any(), "token 2 came third to both of its experts"
    np.testing.assert_allclose(y[3], 0.25 * expert_ffn(x[3:4], weights, 2, config)[0], rtol=1e-12)


def test_no_choice_takes_no_slot_and_adds_nothing():
    config = make_config(num_ranks=1, num_tokens=5, capacity=2, dtype="float64")
    weights, x = Weights.random(config), make_x(config)[0]
    idx = np.array([[0, -1], [6, 0], [-1, -1], [0, 6], [6, 4]])
    factors = np.array([[0.5, np.nan], [np.inf, 3.0], [np.nan, np.nan], [3.0, 1.0], [-1.0, 0.5]])
    y = moe_layer(x, weights, config, idx, factors)
    routing = [[(0, 0.5)], [(0, 3.0)], [], [(0, 3.0)], [(4, 0.5)]]  # token 3 comes third to expert 0
    np.testing.assert_allclose(y, naive_source(x, weights, config, routing), rtol=1e-12, atol=1e-12)
    assert not y[2:4].any() and y[4].any()


@pytest.mark.parametrize(("dtype", "below", "beyond"), [
    ("float16", 65519.9, 65520.0), ("bfloat16", 3.395e38, 3.397e38), ("float32", 3.4028235e38, 3.4028236e38),
])  # fmt: skip
def test_what_leaves_the_range_of_the_element_type_is_infinite(dtype, below, beyond):
    """A row of ones: hidden rows are `up`, results `up * down`, neither rounded, but infinite as rounding makes it."""
    config = make_config(dtype=dtype, num_ranks=1, num_experts=1, num_topk=1, gated=False, activation="identity")
    one, up, down = (np.zeros(shape) for shape in ((1, 17), (1, 11, 17), (1, 17, 11)))
    one[0, 0], up[0, 0, 0], down[0, :2, 0] = 1, 1, (1, -1)
    exact = dict(router=np.zeros((1, 17)), up_proj=up, down_proj=down)
    for value, expected in ((below, below), (beyond, np.inf)):
        result = expert_ffn(one * value, Weights(**exact), 0, config)
        assert result[0, :2].tolist() == [expected, -expected]  # a hidden row and a result of that size
    result = expert_ffn(one, Weights(**(exact | {"down_proj": down * beyond})), 0, config)
    assert np.isposinf(result[0, 0]) and np.isneginf(result[0, 1])


def test_a_weight_of_zero_adds_nothing_and_a_sum_may_overflow():
    config = make_config(dtype="float16", num_ranks=1, num_experts=3, num_topk=2, gated=False, activation="identity")
    weights = Weights.random(config)
    weights.up_proj[:], weights.down_proj[:] = 0, 0
    weights.up_proj[:, 0, 0], weights.down_proj[:, 0, 0] = 1, (60000, 37504, 1)
    x = np.zeros((4, 17), np.float16)
    x[:, 0] = (2, 1, 1, 1)
    idx = np.array([[0, 2], [0, 1], [0, 1], [0, 2]])
    factors = np.array([[0.0, 1], [1, 1], [1, -0.5], [-0.0, 0]])
    y = moe_layer(x, weights, config, idx, factors)
    assert y[:, 0].tolist() == [2, np.inf, 60000 - 37504 / 2, 0] and not np.isnan(y).any()


def test_bad_rows_stay_in_their_rows():
    config = make_config()
    weights, x = Weights.random(config), np.stack(make_x(config))
    clean = moe_layer(x, weights, config)
    x[0, 3, 2], x[1, 0, 5], x[1, 12, 0] = np.nan, np.inf, -np.inf
    y = moe_layer(x, weights, config)
    bad = np.zeros((2, 13), bool)
    bad[0, 3] = bad[1, 0] = bad[1, 12] = True
    assert np.isnan(y[bad]).all()
    np.testing.assert_allclose(y[~bad], clean[~bad], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "value", "expected"), [
    ("identity", -1.5, -1.5), ("relu", -1.5, 0.0), ("relu", 2.0, 2.0),
    ("gelu", 1.0, 0.8413447460685429), ("gelu", -3.0, -3 * 0.0013498980316300946), ("silu", 1.0, 0.7310585786300049),
    ("silu", -800.0, 0.0),
])  # fmt: skip
def test_activation_values(name, value, expected):
    for dtype, rtol in ((np.float64, 1e-12), (np.float32, 1e-5)):
        result = activation(name, np.full((2, 3), value, dtype))
        assert result.dtype == dtype and result.shape == (2, 3)
        np.testing.assert_allclose(result, expected, rtol=rtol, atol=1e-300)


def test_hidden_activation_is_not_rounded():
    config = make_config(dtype="bfloat16", num_topk=1)
    weights, x = Weights.random(config), make_x(config)[0]
    result = expert_ffn(x, weights, 4, config)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result[5], naive_expert(x[5].astype(float), weights, 4, config), rtol=1e-12, atol=1e-13)


def test_errors_name_the_argument_and_both_sides():
    config = make_config()
    weights, x = Weights.random(config), make_x(config)
    with pytest.raises(ValueError, match="all num_experts=6, got 3"):
        moe_layer(x, weights.shard(0, 2), config)
    with pytest.raises(ValueError, match="num_ranks=2, got 3"):
        moe_layer([*x, x[0]], weights, config)
    with pytest.raises(ValueError, match=r"x\[1\] must have shape \[any, 17\], got \[13, 16\]"):
        moe_layer([x[0], x[1][:, :16]], weights, config)
    with pytest.raises(ValueError, match=r"x\[0\] must have at most num_tokens=13 rows, got 26"):
        moe_layer([np.concatenate(x), x[1]], weights, config)
    with pytest.raises(TypeError, match=r"x\[0\] must have a floating dtype .* got int64"):
        moe_layer([x[0].astype(int), x[1]], weights, config)
    ragged = np.empty(2, object)
    ragged[:] = x[0], x[1][:5]
    with pytest.raises(TypeError, match=r"x must be a list .* array of objects: list\(x\)\?"):
        moe_layer(ragged, weights, config)
    idx, factors = np.zeros((13, 2), int), np.ones((13, 2))
    with pytest.raises(ValueError, match="topk_weights is given, but topk_idx is not"):
        moe_layer(x, weights, config, topk_weights=[factors, factors])
    with pytest.raises(ValueError, match="topk_idx must have as many parts as x, 2, got 1"):
        moe_layer(x, weights, config, idx, [factors, factors])
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'tanh'"):
        activation("tanh", x[0])
