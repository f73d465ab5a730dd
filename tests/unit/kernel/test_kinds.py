"""The kernel with each kind of router and of experts, against the reference; and what a router is given."""

from dataclasses import replace

import numpy as np
import pytest
from cases import (
    DTYPES,
    assert_close_to_oracle,
    assert_equals_oracle,
    assert_same_bits,
    random_routing,
    random_tokens,
    tiny_config,
)
from kinds import EXPERTS, NORMED, ROUTERS, V3

from flashmoe_numba import FlashMoE
from reference import MoEConfig, RouterKind, Weights, check_routing
from reference.routers import choose

FIBERS = dict(backend="fibers", lanes=3, seed=1)
SIZES = dict(num_tokens=7, hidden=9, ffn=6, tile_m=4, tile_m_min=2, tile_n=4, token_block=3)


def make_config(kind, **fields):
    sizes = SIZES | dict(num_experts=12 + kind.num_always, num_topk=3 + kind.num_always, num_ranks=2, router=kind)
    return MoEConfig(**(sizes | fields))


def call(config, weights, x, given=None, num_processors=2, **settings):
    """(results, routings) of one call."""
    with FlashMoE(config, weights, num_processors=num_processors, **settings) as layer:
        return layer(x, **(given or {})), layer.routing


def what_is_given(config, x):
    if config.router_kind.choice != "given":
        return {}
    idx, _ = random_routing(config, [len(part) for part in x])
    idx[0][1, 1:] = -1, config.num_experts
    return {"topk_idx": idx}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_kind_of_router(name, dtype):
    config = make_config(ROUTERS[name], dtype=dtype)
    weights, x = Weights.random(config, seed=4, bias=True), random_tokens(config, [7, 5])
    for settings in ({}, FIBERS):
        y, routings = call(config, weights, x, what_is_given(config, x), **settings)
        assert_equals_oracle(y, x, weights, config, routings)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("expert", EXPERTS)
def test_bits_do_not_depend_on_ranks_processors_tiles_or_packing(name, expert):
    """One rank with all tokens, and two that share them."""
    config = make_config(ROUTERS[name], expert=EXPERTS[expert])
    weights, x = Weights.random(config, seed=4, bias=True), random_tokens(config, [7, 5])
    given = what_is_given(config, x)
    y, routings = call(config, weights, x, given)
    one = replace(config, num_ranks=1, num_tokens=12, tile_m=2, tile_n=9, token_block=5)
    whole = {key: [np.concatenate(parts)] for key, parts in given.items()}
    y1, routings1 = call(one, weights, [np.concatenate(x)], whole, num_processors=1, packing="none")
    assert_same_bits(np.concatenate(y), y1[0], name)
    for part in ("topk_idx", "topk_weights"):
        assert_same_bits(np.concatenate([getattr(r, part) for r in routings]), getattr(routings1[0], part), part)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("backend", [{}, FIBERS])
def test_ties_and_bad_rows_are_those_of_the_reference(name, backend):
    """By logits from outside, which are exact: the same experts, and a bad row spoils its own only."""
    kind = replace(ROUTERS[name], selection_bias=False, logit_bias=False)
    config = make_config(kind, dtype="float64", num_ranks=1)
    weights, x = Weights.random(config, seed=4), random_tokens(config)
    logits = np.random.default_rng(0).integers(-2, 3, (7, config.num_experts)) / 2.0
    logits[1], logits[2, 3], logits[3, 5], logits[4] = 0, np.nan, np.inf, -np.inf
    logits[5, ::2] = -np.inf
    given = what_is_given(config, x)
    y, (routing,) = call(config, weights, x, given | {"logits": [logits]}, **backend)
    idx = np.where(given["topk_idx"][0] < config.num_experts, given["topk_idx"][0], -1) if given else None
    expected = choose(logits, kind, config.num_topk, weights, idx)
    np.testing.assert_array_equal(routing.topk_idx, expected.topk_idx)
    np.testing.assert_allclose(routing.topk_weights, expected.topk_weights, rtol=1e-13, atol=1e-300)
    bad = np.isnan(expected.topk_weights).any(axis=1)
    assert bad[2:5].all() and not bad[:2].any()
    assert (np.isfinite(y[0]).all(axis=1) == ~bad).all()


@pytest.mark.parametrize("settings", [{}, FIBERS])
def test_choices_of_an_earlier_call_are_forgotten(settings):
    """Of tokens that have fewer now."""
    config = make_config(ROUTERS["deepseek_v4_hash"])
    weights, x = Weights.random(config, seed=4, bias=True), random_tokens(config, [7, 5])
    every, _ = random_routing(config, [7, 5])
    fewer = what_is_given(config, x)
    with FlashMoE(config, weights, num_processors=2, **settings) as layer:
        layer(x, topk_idx=every)
        y, routings = layer(x, **fewer), layer.routing
        assert_equals_oracle(y, x, weights, config, routings)
        alone, alone_routings = call(config, weights, x, fewer, **settings)
        assert_same_bits(y, alone)
        for part in ("topk_idx", "topk_weights"):
            assert_same_bits([getattr(r, part) for r in routings], [getattr(r, part) for r in alone_routings], part)


@pytest.mark.parametrize("backend", [{}, FIBERS])
@pytest.mark.parametrize("fill", ["lowest", "zero"])
def test_experts_of_closed_groups_are_below_all_or_zero(fill, backend):
    """Biases below every score: what is filled with zero is chosen before what is open."""
    kind = replace(V3, num_topk_groups=1, group_fill=fill)
    config = make_config(kind, dtype="float64", num_ranks=1)
    x = random_tokens(config)
    weights = replace(Weights.random(config, seed=4), selection_bias=np.linspace(-2.5, -2, 12))
    logits = np.random.default_rng(0).standard_normal((7, 12))
    _, (routing,) = call(config, weights, x, {"logits": [logits]}, **backend)
    expected = choose(logits, kind, config.num_topk, weights)
    np.testing.assert_array_equal(routing.topk_idx, expected.topk_idx)
    other = choose(logits, replace(kind, group_fill="zero" if fill == "lowest" else "lowest"), config.num_topk, weights)
    assert (other.topk_idx != expected.topk_idx).any(axis=1).all()


@pytest.mark.parametrize("sizes", [dict(num_topk=12), dict(num_experts=1, num_topk=1, num_ranks=1)])
def test_all_experts_and_one_expert(sizes):
    kind = replace(V3, num_groups=1, num_topk_groups=1, group_score="max")
    config = make_config(kind, **sizes)
    weights, x = Weights.random(config, seed=4, bias=True), random_tokens(config)
    for settings in ({}, FIBERS):
        y, routings = call(config, weights, x, **settings)
        assert_equals_oracle(y, x, weights, config, routings)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_kind_of_expert(name, dtype):
    config = tiny_config(expert=EXPERTS[name], gated=True, activation="silu", dtype=dtype)
    weights, x = Weights.random(config, seed=4, bias=True), random_tokens(config)
    for settings in ({}, FIBERS):
        y, routings = call(config, weights, x, **settings)
        assert_equals_oracle(y, x, weights, config, routings)


@pytest.mark.parametrize("router", [RouterKind(renormalize=True), ROUTERS["llama4"]])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_with_a_norm(dtype, router):
    sizes = dict(num_ranks=2, num_tokens=40, hidden=96, ffn=64, num_experts=4, num_topk=2, token_block=8)
    config = MoEConfig(**sizes, expert=NORMED, router=router, dtype=dtype)
    weights, x = Weights.random(config, seed=4, bias=True), random_tokens(config, [40, 0])
    y, routings = call(config, weights, x)
    assert_close_to_oracle(y, x, weights, config, routings)
    few = replace(config, num_tokens=3)
    for lanes in (1, 3):
        part = call(few, weights, [x[0][:3], x[1]], backend="fibers", lanes=lanes)
        assert_close_to_oracle(part[0], [x[0][:3], x[1]], weights, few, part[1])


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "deepseek_v4_hash"])
@pytest.mark.parametrize("settings", [{}, FIBERS])
def test_logits_from_outside_are_routed_as_the_layers_own(name, settings):
    """Of small integers, whose products are exact."""
    config = make_config(ROUTERS[name])
    weights, rng = Weights.random(config, seed=4, bias=True), np.random.default_rng(0)
    weights = replace(weights, router=rng.integers(-1, 2, weights.router.shape).astype(np.float32))
    x = [rng.integers(-1, 2, part.shape).astype(np.float32) for part in random_tokens(config, [7, 0])]
    given = what_is_given(config, x)
    logits = [part @ weights.router.T for part in x]
    y, routings = call(config, weights, x, given | {"logits": logits}, **settings)
    own, own_routings = call(config, weights, x, given, **settings)
    assert_same_bits(y, own)
    assert_same_bits([r.topk_weights for r in routings], [r.topk_weights for r in own_routings])
    y, routings = call(config, weights, x, given | {"logits": [rng.permuted(z, axis=1) for z in logits]}, **settings)
    assert any((a != b).any() for a, b in zip(y, own, strict=True)), "logits from outside are not looked at"


def test_logits_may_be_of_any_floating_type_and_belong_to_one_call():
    config = tiny_config()
    weights, x = Weights.random(config), random_tokens(config)
    logits = [np.random.default_rng(rank).standard_normal((7, 4)) for rank in range(2)]
    with FlashMoE(config, weights) as layer:
        own = layer(x)
        given = layer(x, logits=logits)
        for rank, routing in enumerate(layer.routing):
            as_tokens = replace(weights, router=np.eye(4, dtype=np.float32))
            assert check_routing(routing, logits[rank].astype(np.float32), as_tokens, config) is None
        assert_same_bits(layer(x, logits=[z.astype(np.float32) for z in logits]), given)
        assert_same_bits(layer(x), own)


@pytest.mark.parametrize(
    ("choice", "arguments", "message"),
    [
        ("logits", dict(logits=np.zeros((2, 7, 5))), r"rank 0: logits must have shape \[7, 4\]"),
        ("logits", dict(logits=np.zeros((2, 7, 4), int)), "rank 0: logits must have a floating dtype"),
        ("logits", dict(logits=np.zeros((3, 7, 4))), "logits must have one part per rank: num_ranks=2, got 3"),
        ("logits", dict(topk_weights=np.ones((2, 7, 2))), "topk_idx must be given where topk_weights is"),
        ("logits", dict(topk_idx=np.ones((2, 7, 2), int)), "topk_weights must be given where topk_idx is"),
        ("given", {}, "topk_idx must be given, because config's router has choice 'given'"),
        ("given", dict(topk_idx=np.ones((2, 7, 2), int)), r"rank 0: topk_idx: the experts of a token must be distinct"),
        ("given", dict(topk_idx=np.full((2, 7, 2), 9)), r"rank 0: topk_idx: values must be in \[0, num_experts=4\)"),
        (
            "given",
            dict(topk_idx=np.full((2, 7, 2), -1), topk_weights=np.ones((2, 7, 2)), logits=np.ones((2, 7, 4))),
            "logits must be None where topk_weights is given",
        ),
    ],
)
def test_what_cannot_stand_together_is_told(choice, arguments, message):
    config = tiny_config(router=RouterKind(choice=choice))
    error = pytest.raises((TypeError, ValueError), match=message)
    with FlashMoE(config, Weights.random(config), backend="fibers") as layer, error:
        layer(random_tokens(config), **arguments)
