"""Shared and zero-computation experts of the oracle, against a loop over tokens that shares no code with it."""

import dataclasses
import math

import numpy as np
import pytest
from test_reference_layer import make_config, make_x, naive_expert, naive_source

from reference import Weights, external_routing, make_packets, moe_layer
from reference.experts import sigmoid


def naive_layer(tokens, w, config, routing=None):
    """`naive_source` on the choices of real experts, then what is particular here, token by token."""
    chosen = [naive_choices(row, w, config) for row in tokens.astype(np.float64)] if routing is None else routing
    y = naive_source(tokens, w, config, [[(e, f) for e, f in c if 0 <= e < config.num_experts] for c in chosen])
    for t, row in enumerate(tokens.astype(np.float64)):
        for e, factor in chosen[t]:
            if e >= config.num_experts and config.zero == "identity":
                y[t] += factor * row
        if config.shared_ffn:
            alone = Weights(
                router=w.router,
                up_proj=w.shared_up_proj[None],
                down_proj=w.shared_down_proj[None],
                gate_proj=None if w.shared_gate_proj is None else w.shared_gate_proj[None],
                gate_bias=None if w.shared_gate_bias is None else w.shared_gate_bias[None],
                up_bias=None if w.shared_up_bias is None else w.shared_up_bias[None],
                down_bias=None if w.shared_down_bias is None else w.shared_down_bias[None],
            )
            logit = float(row @ w.shared_gate_weight.astype(np.float64)) if config.shared_gate else math.inf
            y[t] += naive_expert(row, alone, 0, config) / (1 + math.exp(-logit))
    return y


def naive_choices(row, w, config):
    logits = [math.fsum(float(a) * float(b) for a, b in zip(row, r, strict=True)) for r in w.router]
    order = sorted(range(len(logits)), key=lambda e: (-logits[e], e))[: config.num_topk]
    p = [math.exp(z - max(logits)) for z in logits]
    total = sum(p[e] for e in order) if config.renormalize else sum(p)
    return [(e, p[e] / total) for e in order]


CASES = [
    {"shared_ffn": 7},
    {"shared_ffn": 23, "shared_gate": True},
    {"shared_ffn": 1, "shared_gate": True, "gated": False, "activation": "gelu", "dtype": "bfloat16"},
    {"num_zero": 5, "num_topk": 3},
    {"num_zero": 5, "num_topk": 3, "zero": "none", "renormalize": False},
    {"num_zero": 2, "num_topk": 8, "capacity": 2, "shared_ffn": 11, "shared_gate": True},
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer_equals_a_loop_over_tokens(case, bias):
    config = make_config(**case)
    weights, x = Weights.random(config, seed=3, bias=bias), make_x(config)
    for y, tokens in zip(moe_layer(x, weights, config), x, strict=True):
        np.testing.assert_allclose(y, naive_layer(tokens, weights, config), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("change", [{"shared_ffn": 0, "shared_gate": False}, {"shared_gate": False}, {"zero": "none"}])
def test_each_part_matters(change):
    """A case can pass without exercising its feature: switch it off and the result is another one."""
    config = make_config(shared_ffn=7, shared_gate=True, num_zero=3, num_topk=3)
    weights, x = Weights.random(config), make_x(config)[0]
    other = dataclasses.replace(config, **change)
    changed = moe_layer(x, Weights.random(other), other)
    assert np.abs(moe_layer(x, weights, config) - changed).max() > 0.01


def test_no_tokens_and_all_choices_zero():
    config = make_config(num_zero=4, num_topk=3, shared_ffn=7, num_ranks=1)
    weights, x = Weights.random(config), make_x(config)[0][:3]
    assert moe_layer(x[:0], weights, config).shape == (0, 17)
    idx = np.array([[6, 7, 8], [9, 8, 7], [-1, 10, 6]])  # 10 = num_choices: no choice, as -1
    factors = np.array([[0.5, 0.25, -2.0], [1.0, 0.0, 0.0], [np.nan, 7.0, 0.5]])
    chosen = [list(zip(i, f, strict=True)) for i, f in zip(idx.tolist(), factors.tolist(), strict=True)]
    chosen[2] = [(6, 0.5)]
    y = moe_layer(x, weights, config, idx, factors)
    np.testing.assert_allclose(y, naive_layer(x, weights, config, chosen), rtol=1e-12, atol=1e-12)
    routing = external_routing(idx, factors, config, 3)
    assert routing.topk_idx.tolist() == [[6, 7, 8], [9, 8, 7], [-1, -1, 6]]
    packets = make_packets(routing.topk_idx, config)
    assert (packets.counts.sum(), packets.dropped, packets.slot.max()) == (0, 0, -1)


def test_which_indices_from_outside_are_right():
    config = make_config(num_zero=2, num_topk=2)
    for idx, rule in (
        ([[0, 9]], r"values must be in \[0, num_choices=8\), or -1 or 8 for no choice, got \[0, 9\] in row 0"),
        ([[7, 7]], r"the experts of a token must be distinct, got \[7, 7\] in row 0"),
    ):
        with pytest.raises(ValueError, match=rule):
            external_routing(np.array(idx), np.ones((1, 2)), config, 1)


def test_what_is_not_finite():
    """A zero choice of an infinite token is infinite, one of weight 0 adds nothing, nor does a factor of 0."""
    config = make_config(num_zero=2, shared_ffn=3, shared_gate=True, num_ranks=1, gated=False, activation="identity")
    weights, x = Weights.random(config), np.ones((1, 17), np.float32)
    x[0, 0] = np.inf
    signs = np.where(np.arange(17) == 0, -1.0, 0.0).astype(np.float32)
    closed = dataclasses.replace(weights, shared_gate_weight=signs)  # logit -inf
    assert np.array_equal(sigmoid(np.array([-np.inf, -1000.0, np.inf])), [0, 0, 1])
    for factors, finite in (([1.0, 0.0], False), ([0.0, 0.0], True)):
        y = moe_layer(x, closed, config, np.array([[6, 7]]), np.array([factors]))
        assert np.isfinite(y).all() == finite
    y = moe_layer(
        x, dataclasses.replace(weights, shared_gate_weight=-signs), config, np.array([[-1, -1]]), np.ones((1, 2))
    )
    assert not np.isfinite(y).any()


def test_weights_of_other_experts_are_what_they_were():
    plain, more = make_config(), make_config(shared_ffn=5, shared_gate=True, num_zero=3)
    old, new = Weights.random(plain, bias=True), Weights.random(more, bias=True)
    for name in ("up_proj", "gate_proj", "down_proj", "up_bias", "gate_bias", "down_bias"):
        assert np.array_equal(getattr(old, name), getattr(new, name))
    assert np.array_equal(old.router, new.router[:6]) and new.router.shape == (9, 17)
    part = new.shard(1, 2)
    assert part.shared_up_proj is new.shared_up_proj and part.first_expert == 3
    assert new.num_bytes - old.num_bytes == 4 * (3 * 17 + 3 * 5 * 17 + 5 + 5 + 17 + 17)
    assert 0.5 < new.shared_down_proj.std() * 5**0.5 < 1.5 and new.shared_gate_weight.shape == (17,)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"shared_ffn": -1}, r"shared_ffn must be in \[0, 2\*\*31 - 1\], got -1"),
        ({"num_zero": -2}, r"num_zero must be in \[0, 2\*\*31 - 1\], got -2"),
        ({"shared_gate": True}, r"shared_gate must be False without a shared expert \(shared_ffn=0\), got True"),
        ({"zero": "copy"}, r"zero must be .*identity, none.* got 'copy'"),
        ({"num_zero": 1, "num_topk": 8}, r"num_topk must be in \[1, num_experts=6 \+ num_zero=1\], got 8"),
        ({"num_topk": 7}, r"num_topk must be in \[1, num_experts=6\], got 7"),
    ],
)
def test_bad_fields(changes, rule):
    with pytest.raises(ValueError, match=rule):
        make_config(**changes)


def test_bad_weights():
    config = make_config(shared_ffn=5, shared_gate=True)
    good = Weights.random(config)
    for name, value, error, rule in (
        ("shared_up_proj", None, ValueError, r"shared_up_proj is missing, but config.shared_ffn is 5"),
        (
            "shared_down_proj",
            good.shared_up_proj,
            ValueError,
            r"shared_down_proj must have shape \[17, 5\], got \[5, 17\]",
        ),
        (
            "shared_up_proj",
            good.shared_up_proj.astype(float),
            TypeError,
            r"shared_up_proj must have config's dtype float32",
        ),
        ("shared_gate_weight", None, ValueError, r"shared_gate_weight is missing, but config.shared_gate is True"),
        (
            "shared_gate_weight",
            np.ones(5, np.float32),
            ValueError,
            r"shared_gate_weight must have shape \[17\], got \[5\]",
        ),
        ("num_zero", 1, ValueError, r"num_zero must be config's, 0, got 1"),
        ("router", np.ones((5, 17), np.float32), ValueError, r"router must have shape \[6, 17\], got \[5, 17\]"),
    ):
        with pytest.raises(error, match=rule):
            dataclasses.replace(good, **{name: value}).check(config)
    with pytest.raises(ValueError, match=r"shared_gate_proj is given, but config.shared_ffn is 0"):
        good.check(make_config())
    with pytest.raises(ValueError, match=r"shared_gate_weight is given, but config.shared_gate is False"):
        good.check(make_config(shared_ffn=5))
    with pytest.raises(ValueError, match=r"shared_gate_proj is given, but config's experts are not gated"):
        dataclasses.replace(good, gate_proj=None).check(make_config(shared_ffn=5, shared_gate=True, gated=False))
