"""How a family's file takes values from a model's config."""

import pytest

from reference import ExpertKind, RouterKind
from reference.families import family_names, read_family
from reference.families.layer_config import layer_config
from reference.families.values import resolve, section_values

MODEL = {"width": 5, "none": None, "inner": {"deep": {"k": 3}}, "per_layer": [7, 0, 9], "shared": 2, "word": "a"}


@pytest.mark.parametrize(("value", "expected"), [
    (4, 4), ("word", "word"), ("$width", 5), ("$none|width", 5), ("$missing|none|true", True),
    ("$missing|'silu'", "silu"),
    ("$inner.deep.k", 3), ("$per_layer", 9), ("$per_layer[0]", 7), ("$width*shared", 10), ("$width+shared", 7),
    ("$width+shared*width", 15), ("$width*missing|4", 4), ("$missing.deep|1e-20", 1e-20), ("$per_layer[1]|3", 0),
])  # fmt: skip
def test_values(value, expected):
    assert resolve(value, MODEL, layer=2) == expected


def test_a_value_that_is_not_there_is_named():
    with pytest.raises(KeyError, match="missing or none"):
        resolve("$missing|none", MODEL)
    with pytest.raises(ValueError, match=r"per_layer .* must have a value for layer 3, got \[7, 0, 9\]"):
        resolve("$per_layer", MODEL, layer=3)


def test_cases_set_values_or_refuse():
    section = {"score": "x", "when": [
        {"word": "a", "set": {"score": "$width"}}, {"word": "b", "set": {"score": "z"}}, {"shared": 3, "refuse": "no"},
    ]}  # fmt: skip
    assert section_values(section, MODEL, 0) == {"score": 5}
    assert section_values(section, MODEL | {"word": "b"}, 0) == {"score": "z"}
    with pytest.raises(ValueError, match=r"^no$"):
        section_values(section, MODEL | {"shared": 3, "word": "c"}, 0)


def layer(family, model, **fields):
    own = dict(num_tokens=4, num_ranks=1) | fields
    return layer_config(read_family(family), model, **own)


DEEP = dict(hidden_size=32, moe_intermediate_size=16, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=2)
STEP = DEEP | dict(share_expert_dim=24, swiglu_limits=[0.0, 7.0], swiglu_limits_shared=[16.0, 0.0])


def test_a_config_as_published():
    config = layer("deepseek_v3", DEEP | dict(n_group=8, topk_group=4, routed_scaling_factor=2.5))
    grouped = dict(num_groups=8, num_topk_groups=4, group_score="top2_sum", renormalize=True, norm_eps=1e-20, scale=2.5)
    assert config.router_kind == RouterKind(score="sigmoid", choice="score", selection_bias=True, **grouped)
    assert config.expert_kind == ExpertKind(activation="silu", gated=True)
    assert (config.shared_ffn, config.shared_kind, config.num_experts) == (32, config.expert_kind, 16)
    assert layer("deepseek_v3", DEEP, ffn=8, router=None).router_kind == RouterKind(renormalize=True)


def test_what_is_none_in_a_config_is_none_in_a_kind():
    plain = layer("deepseek_v3", DEEP | dict(n_group=1, topk_group=1, norm_topk_prob=False, n_shared_experts=0))
    assert plain.router_kind == RouterKind(score="sigmoid", choice="score", selection_bias=True)
    assert plain.shared_ffn == 0


def test_limits_of_each_layer():
    first, second = (layer("step3p7", STEP, layer=index) for index in (0, 1))
    assert first.expert_kind.plain and first.shared_kind.gate_limit == 16.0
    assert second.expert_kind.bound == "clamp_activated" and second.expert_kind.up_limit == 7.0
    assert second.shared_kind.plain


def test_what_no_layer_computes_is_refused():
    model = dict(hidden_size=8, intermediate_size=4, num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
    with pytest.raises(ValueError, match="family 'cohere2_moe': its shared and routed results are averaged"):
        layer("cohere2_moe", model | dict(shared_expert_combination_strategy="average"))
    none = dict(shared_expert_combination_strategy="average", num_shared_experts=0)
    assert layer("cohere2_moe", model | none).shared_ffn == 0
    with pytest.raises(ValueError, match=r"config of model_type 'mixtral' must have intermediate_size \(sizes.ffn\)"):
        layer("mixtral", dict(hidden_size=8))
    with pytest.raises(ValueError, match=r"score must be one of .*; got 'tanh'"):
        layer("deepseek_v4", DEEP | dict(scoring_func="tanh"))


@pytest.mark.parametrize("name", family_names())
def test_a_family_says_what_it_is(name):
    family = read_family(name)
    assert family.block and (family.sections["router"] or family.outside.startswith("everything"))
    assert bool(family.sections["router"]) == bool(family.sections["experts"]) == bool(family.sections["tested"])


@pytest.mark.parametrize(("own", "rule"), [
    (dict(renormalize=True), "renormalize must be what family 'deepseek_v3' says, False, unless router is given"),
    (dict(gated=False), "gated must be what family 'deepseek_v3' says, True, unless expert is given; got False"),
    (dict(activation="gelu"), "activation must be what family 'deepseek_v3' says, silu, unless expert"),
])  # fmt: skip
def test_a_short_spelling_that_differs_from_the_family_is_refused_even_where_it_is_the_default(own, rule):
    model = DEEP | dict(norm_topk_prob=False)
    with pytest.raises(ValueError, match=rule):
        layer("deepseek_v3", model, **own)
    agreed = layer("deepseek_v3", model, renormalize=False, gated=True, activation="silu")
    assert not agreed.router_kind.renormalize and agreed.expert_kind == ExpertKind(activation="silu", gated=True)
    plain = ExpertKind(activation="gelu", gated=False)
    assert layer("deepseek_v3", model, expert=plain, gated=False).expert_kind == plain
