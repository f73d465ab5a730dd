"""Every field of a kind of expert, against formulas of the public models written out one number after the other."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from reference import ExpertKind, MoEConfig, TiledLayer, Weights, expert_ffn, max_rel_error, moe_layer, tolerance
from reference.experts import activate

silu = lambda g: g / (1 + math.exp(-g))  # noqa: E731
clip = lambda u, limit: max(-limit, min(limit, u))  # noqa: E731
PUBLIC = {
    "clamped": (dict(bound="clamp", gate_limit=0.75, up_limit=0.5), lambda g, u: silu(min(g, 0.75)) * clip(u, 0.5)),
    "gpt_oss": (
        dict(bound="clamp", gate_limit=0.75, up_limit=0.75, slope=1.702, up_offset=1.0),
        lambda g, u: (clip(u, 0.75) + 1) * min(g, 0.75) / (1 + math.exp(-1.702 * min(g, 0.75))),
    ),
    "step3p7": (
        dict(bound="clamp_activated", gate_limit=0.25, up_limit=0.5),
        lambda g, u: min(silu(g), 0.25) * clip(u, 0.5),
    ),
    "inkling2": (
        dict(bound="softcap", gate_limit=0.5, up_limit=0.75),
        lambda g, u: 0.5 * math.tanh(g / 0.5) / (1 + math.exp(-g)) * 0.75 * math.tanh(u / 0.75),
    ),
    "plain": ({}, lambda g, u: silu(g) * u),
}


def make_config(kind, **fields):
    sizes = dict(num_ranks=2, num_tokens=7, hidden=9, ffn=11, num_experts=4, num_topk=2, dtype="float64")
    return MoEConfig(**(sizes | dict(expert=kind, tile_m=8, tile_m_min=2, tile_n=6, token_block=3) | fields))


def make_kind(name, **fields):
    return ExpertKind(activation="silu", gated=True, **(PUBLIC[name][0] | fields))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_kind_is_the_public_formula(name):
    gate, up = np.random.default_rng(0).standard_normal((2, 5, 40))
    gate[0, :3] = 0.0, -0.0, 1e-300
    expected = np.vectorize(PUBLIC[name][1])(gate, up)
    np.testing.assert_allclose(activate([gate, up], make_kind(name)), expected, rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_word_of_a_kind_changes_the_rows(name):
    gate, up = np.random.default_rng(0).standard_normal((2, 5, 40))
    kind = make_kind(name)
    whole = activate([gate, up], kind)
    for field in set(PUBLIC[name][0]) - {"bound"}:
        if kind.bound == "softcap":
            less = make_kind(name, **{field: 1e9})
        else:
            less = make_kind(name, **{field: ExpertKind.__dataclass_fields__[field].default})
        assert not np.array_equal(activate([gate, up], less), whole), field


def test_nan_and_infinities_pass_bounds_as_numbers_do():
    gate, up = np.array([np.nan, np.inf, 1.0, 1.0]), np.array([1.0, 1.0, np.nan, -np.inf])
    rows = activate([gate, up], make_kind("gpt_oss"))
    assert np.isnan(rows[[0, 2]]).all()
    np.testing.assert_allclose(rows[[1, 3]], activate([np.array([9.0, 1]), np.array([1, -9.0])], make_kind("gpt_oss")))


def test_results_go_through_the_norm_before_their_weights():
    kind = ExpertKind(activation="silu", gated=True, norm_eps=1e-5)
    config = make_config(kind, num_ranks=1, router=None)
    weights = Weights.random(config)
    x = np.random.default_rng(1).standard_normal((7, 9))
    plain = make_config(replace(kind, norm_eps=None), num_ranks=1)
    rows = expert_ffn(x, replace(weights, result_scale=None), 2, plain) * weights.result_scale
    expected = [[v / math.sqrt(sum(w * w for w in row) / 9 + 1e-5) for v in row] for row in rows.tolist()]
    np.testing.assert_allclose(expert_ffn(x, weights, 2, config), expected, rtol=1e-13)
    with pytest.raises(ValueError, match="result_scale is missing, but config's kind of experts asks for it"):
        moe_layer(x, replace(weights, result_scale=None), config)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", [*PUBLIC, "norm", "weight on the input"])
def test_tiles_compute_every_kind(name, dtype):
    kind = ExpertKind(activation="silu", gated=True, norm_eps=1e-5) if name == "norm" else make_kind("plain")
    kind = make_kind(name) if name in PUBLIC else kind
    router = dict(score="sigmoid", weight_input=True) if name == "weight on the input" else None
    config = make_config(kind, dtype=dtype, router=router)
    weights = Weights.random(config, bias=True)
    x = [
        np.random.default_rng(rank).standard_normal((n, 9)).astype(config.numpy_dtype) for rank, n in enumerate((7, 5))
    ]
    tiled = TiledLayer(x, weights, config)
    y = tiled.run(np.random.default_rng(0))
    exact = moe_layer(x, weights, config, topk_idx=tiled.topk_idx, topk_weights=tiled.topk_weights)
    factor = 2 if name == "norm" else 1  # a norm makes errors of results errors of its own row's size
    assert max_rel_error(y, exact) <= factor * tolerance(config)


def test_a_config_is_made_again_of_its_dictionary():
    config = make_config(make_kind("gpt_oss"), router=dict(score="sigmoid"))
    assert MoEConfig(**asdict(config)) == config
    with pytest.raises(TypeError, match="expert must be a ExpertKind, a dictionary of its fields or None, got 'silu'"):
        make_config("silu")


@pytest.mark.parametrize(("fields", "message"), [
    (dict(bound="cap"), "bound must be one of none, clamp, clamp_activated, softcap; got 'cap'"),
    (dict(gate_limit=1.0), r"gate_limit and up_limit must stay None for bound 'none', got \(1.0, None\)"),
    (dict(bound="clamp", gate_limit=0.0), "gate_limit must be above 0, got 0.0"),
    (dict(bound="softcap", gate_limit=1.0), "must be numbers for bound 'softcap'"),
    (dict(bound="softcap", gate_limit=1.0, up_limit=1.0, activation="gelu"), "must have activation 'silu', got 'gelu'"),
    (dict(gated=False, up_offset=1.0), "must stay 'none', 0 and 1 if gated is False"),
    (dict(slope=-1.0), "slope must be above 0, got -1.0"),
])  # fmt: skip
def test_what_no_expert_can_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ExpertKind(**(dict(activation="silu", gated=True) | fields))
