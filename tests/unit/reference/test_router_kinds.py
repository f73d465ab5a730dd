"""Every field of a kind of router, against a second implementation, one token and one expert after the other."""

import math
from dataclasses import replace

import numpy as np
import pytest

from reference import ExpertKind, MoEConfig, RouterKind, Routing, Weights, check_routing, moe_layer, route
from reference.routers import choose, route_logits

BIASED = RouterKind(score="sigmoid", choice="score", selection_bias=True, renormalize=True, norm_eps=1e-20, scale=2.5)
GROUPED = replace(BIASED, num_groups=4, num_topk_groups=2, group_score="top2_sum")
KINDS = {
    "softmax": RouterKind(),
    "renormalised": RouterKind(renormalize=True),
    "biased softmax": RouterKind(choice="score", selection_bias=True, renormalize=True, norm_min=0.25),
    "sigmoid": RouterKind(score="sigmoid"),
    "biased sigmoid": BIASED,
    "top-2 groups": GROUPED,
    "top-2 groups, rest zero": replace(GROUPED, group_fill="zero", num_topk_groups=1),
    "best groups": RouterKind(choice="score", num_groups=3, num_topk_groups=2, group_score="max", scale=0.5),
    "sqrt of softplus": replace(BIASED, score="sqrt_softplus"),
    "biased logits": RouterKind(score="sigmoid", selection_bias=True, renormalize=True),
    "2-norm": RouterKind(renormalize=True, norm_order=2.0),
    "sparsemixer": RouterKind(score="sparsemixer", jitter=0.3),
    "shared in the norm": replace(BIASED, num_always=2),
    "capped": replace(BIASED, logit_cap=0.5, logit_scale=1.5),
    "biased and scaled": RouterKind(renormalize=True, logit_bias=True, expert_scale=True),
}


def make_config(kind, **fields):
    sizes = dict(num_ranks=1, num_tokens=60, hidden=33, ffn=5, num_experts=12 + kind.num_always)
    return MoEConfig(**(sizes | dict(num_topk=3 + kind.num_always, dtype="float64", router=kind) | fields))


def make_case(kind, **fields):
    config = make_config(kind, **fields)
    x = np.random.default_rng(3).standard_normal((60, 33)).astype(config.numpy_dtype)
    return config, x, Weights.random(config, seed=5)


def one_row(row, kind, k, w):
    """Experts and weights of one token by its products with the router, in plain Python."""
    z = [float(v) + (float(w.router_bias[e]) if kind.logit_bias else 0.0) for e, v in enumerate(row)]
    z = [v * kind.logit_scale for v in z]
    if kind.logit_cap:
        z = [kind.logit_cap * math.tanh(v / kind.logit_cap) for v in z]
    total = sum(math.exp(v) for v in z)
    score = {
        "softmax": lambda v: math.exp(v) / total,
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
        "sqrt_softplus": lambda v: math.sqrt(math.log(1 + math.exp(v))),
        "sparsemixer": lambda v: v,
    }[kind.score]
    scores, chosen_from = [score(v) for v in z], len(z) - kind.num_always
    values = (z if kind.choice == "logits" else scores)[:chosen_from]
    if kind.selection_bias:
        values = [v + float(b) for v, b in zip(values, w.selection_bias, strict=True)]
    size = chosen_from // kind.num_groups
    count = 1 if kind.group_score == "max" else 2
    groups = [sum(sorted(values[g * size : (g + 1) * size])[-count:]) for g in range(kind.num_groups)]
    best = sorted(range(kind.num_groups), key=lambda g: -groups[g])[: kind.num_topk_groups]
    fill = -math.inf if kind.group_fill == "lowest" else 0.0
    values = [v if e // size in best else fill for e, v in enumerate(values)]
    idx = sorted(range(chosen_from), key=lambda e: -values[e])[: k - kind.num_always] + list(range(chosen_from, len(z)))
    factors = [scores[e] for e in idx]
    if kind.score == "sparsemixer":
        factors, left = [], dict(enumerate(z))
        for e in idx:
            near = [v for v in left.values() if (z[e] - v) / max(abs(v), z[e]) <= 2 * kind.jitter]
            factors.append(math.exp(z[e]) / sum(map(math.exp, near)))
            del left[e]
    if kind.renormalize:
        norm = sum(f**kind.norm_order for f in factors) ** (1 / kind.norm_order)
        factors = [f / max(norm + kind.norm_eps, kind.norm_min) for f in factors]
    scales = [kind.scale * (float(w.expert_scale[e]) if kind.expert_scale else 1) for e in idx]
    return idx, [factor * scale for factor, scale in zip(factors, scales, strict=True)]


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_what_its_words_say(name):
    kind = KINDS[name]
    config, x, weights = make_case(kind)
    routing = route(x, weights, config)
    rows = [one_row(row, kind, config.num_topk, weights) for row in x @ weights.router.T]
    assert routing.topk_idx.tolist() == [idx for idx, _ in rows]
    np.testing.assert_allclose(routing.topk_weights, [factors for _, factors in rows], rtol=1e-12)


def changes(kind):
    """Names of the fields that are not as they are by default, each with a kind where only it is."""
    for name, default in {f: d.default for f, d in RouterKind.__dataclass_fields__.items()}.items():
        if getattr(kind, name) != default and name not in ("choice", "score", "num_always"):
            less = {name: default}
            if name == "renormalize":
                less |= dict(norm_order=1.0, norm_eps=0.0, norm_min=0.0)
            if name == "num_groups":
                less |= dict(num_topk_groups=1)
            if name == "num_topk_groups":
                less[name] = kind.num_groups
            yield name, replace(kind, **less)


@pytest.mark.parametrize("name", KINDS)
def test_every_word_of_a_kind_changes_the_routing(name):
    kind = KINDS[name]
    config, x, weights = make_case(kind)
    logits = x @ weights.router.T
    whole = choose(logits, kind, config.num_topk, weights)
    for field, less in changes(kind):
        part = choose(logits, less, config.num_topk, weights)
        same = np.array_equal(part.topk_idx, whole.topk_idx) and np.array_equal(part.topk_weights, whole.topk_weights)
        assert not same or field == "norm_eps", f"{name}: without {field} nothing changes"


@pytest.mark.parametrize("name", KINDS)
def test_equal_experts_go_to_the_lowest_index_and_bad_rows_to_the_first(name):
    kind = replace(KINDS[name], selection_bias=False, logit_bias=False)
    config, _, weights = make_case(kind)
    logits = np.zeros((4, config.num_experts))
    logits[1, 3], logits[2, 5] = np.nan, np.inf
    logits[3] = -np.inf
    routing = choose(logits, kind, config.num_topk, weights)
    always = list(range(12, config.num_experts))
    assert routing.topk_idx[0].tolist() == [0, 1, 2, *always]
    assert (routing.topk_idx[1:] == np.arange(config.num_topk)).all()
    assert np.isnan(routing.topk_weights[1:]).all() and np.isfinite(routing.topk_weights[0]).all()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_judge_takes_float32_and_finds_a_wrong_expert_and_weight(name, dtype):
    config, x, weights = make_case(KINDS[name], dtype=dtype)
    logits = np.zeros((len(x), config.num_experts), np.float32)
    for h in range(config.hidden):
        logits += x[:, h, None].astype(np.float32) * weights.router[:, h].astype(np.float32)
    routing = choose(logits, config.router_kind, config.num_topk, weights)
    assert routing.topk_weights.dtype == np.float32
    assert check_routing(routing, x, weights, config) is None
    exact = route(x, weights, config)
    for row in range(0, 60, 7):
        idx, factors = exact.topk_idx.copy(), exact.topk_weights.copy()
        factors[row, 1] *= 1.001
        assert f"token {row}, " in (check_routing(Routing(idx, factors), x, weights, config) or "")
        found = []
        for expert in set(range(12)) - set(idx[row].tolist()):
            idx[row, 2] = expert
            found.append(check_routing(Routing(idx, exact.topk_weights), x, weights, config))
        assert None not in found


def test_a_table_chooses_and_the_scores_weigh():
    kind = RouterKind(score="sqrt_softplus", choice="given", renormalize=True, norm_eps=1e-20, scale=1.5)
    config, x, weights = make_case(kind)
    idx = np.random.default_rng(1).permuted(np.tile(np.arange(12), (60, 1)), axis=1)[:, :3]
    idx[4, 1], idx[7] = -1, 12
    z = x @ weights.router.T
    scores = np.where(idx % 12 == idx, np.take_along_axis(np.sqrt(np.log1p(np.exp(z))), idx % 12, axis=1), 0)
    with np.errstate(invalid="ignore"):
        factors = np.nan_to_num(1.5 * scores / scores.sum(axis=1, keepdims=True))
    expected = moe_layer(x, weights, config, topk_idx=idx, topk_weights=factors)
    np.testing.assert_allclose(moe_layer(x, weights, config, topk_idx=idx), expected, rtol=1e-12)
    with pytest.raises(ValueError, match="topk_idx must be given for a router with choice 'given'"):
        moe_layer(x, weights, config)
    with pytest.raises(ValueError, match="topk_idx is given, but topk_weights is not"):
        moe_layer(x, make_case(RouterKind())[2], make_config(RouterKind()), topk_idx=idx)


def test_logits_from_outside_are_routed_by_the_kind():
    config, x, weights = make_case(GROUPED)
    logits = x @ weights.router.T
    other = replace(weights, router=np.zeros_like(weights.router))
    np.testing.assert_array_equal(moe_layer(x, other, config, logits=logits), moe_layer(x, weights, config))
    with pytest.raises(ValueError, match=r"logits\[0\] must have shape \[60, 12\], got \[60, 11\]"):
        moe_layer(x, weights, config, logits=logits[:, :11])


def test_weight_on_the_input_is_the_expert_of_the_weighted_token():
    kind = RouterKind(score="sigmoid", weight_input=True)
    config, x, weights = make_case(kind, activation="relu")
    routing = route(x, weights, config)
    linear = moe_layer(x, weights, make_config(replace(kind, weight_input=False), activation="relu"))
    # relu(c x) is c relu(x) for a positive c
    np.testing.assert_allclose(moe_layer(x, weights, config), linear, atol=1e-14)
    silu = make_config(kind, activation="silu")
    other = replace(silu, router=replace(kind, weight_input=False))
    y = np.zeros_like(x)
    for j in range(3):
        scaled = x * routing.topk_weights[:, j, None]
        single = replace(other, num_topk=1, router=None)
        y += moe_layer(scaled, weights, single, topk_idx=routing.topk_idx[:, j, None], topk_weights=np.ones((60, 1)))
    np.testing.assert_allclose(moe_layer(x, weights, silu), y, rtol=1e-12)
    assert np.abs(y - moe_layer(x, weights, other)).max() > 1e-3


@pytest.mark.parametrize(("fields", "message"), [
    (dict(score="tanh"), "score must be one of softmax, sigmoid, sqrt_softplus, sparsemixer; got 'tanh'"),
    (dict(choice="best"), "choice must be one of logits, score, given; got 'best'"),
    (dict(num_groups=0), "num_groups must be at least 1, got 0"),
    (dict(num_groups=2, num_topk_groups=3), r"num_topk_groups must be in \[1, 2\], got 3"),
    (dict(norm_eps=1e-20), "must stay 1, 0 and 0 if renormalize is False"),
    (dict(scale=math.inf), "scale must be finite, got inf"),
    (dict(logit_cap=0.0), "logit_cap must be above 0, got 0.0"),
    (dict(jitter=0.1), "jitter must be 0 for score 'softmax', got 0.1"),
    (dict(choice="given", num_always=1), "choice 'given' must have no selection_bias, groups or num_always"),
    (dict(score="sparsemixer", num_groups=2), "score 'sparsemixer' must have choice 'logits'"),
])  # fmt: skip
def test_what_no_router_can_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RouterKind(**fields)


@pytest.mark.parametrize(("kind", "message"), [
    (RouterKind(num_groups=5), "num_groups must divide the 12 experts chosen from, got 5"),
    (RouterKind(num_groups=6, num_topk_groups=1), "num_topk_groups must hold the 3 experts of a token, got 1 of 2"),
    (RouterKind(num_groups=12, num_topk_groups=6, group_score="top2_sum"), "must leave two experts to a group"),
    (RouterKind(num_groups=24, num_topk_groups=24), "num_groups must divide the 12 experts chosen from, got 24"),
])  # fmt: skip
def test_a_kind_that_does_not_fit_the_sizes_is_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        make_config(kind)


def test_weights_have_what_the_kind_asks_for_and_nothing_else():
    config, _, weights = make_case(KINDS["biased and scaled"])
    with pytest.raises(ValueError, match="router_bias is missing, but config's kind of router asks for it"):
        replace(weights, router_bias=None).check(config)
    with pytest.raises(ValueError, match="expert_scale is given, but config's kinds of router and experts do not"):
        weights.check(make_config(RouterKind(logit_bias=True)))
    with pytest.raises(ValueError, match="router_bias must be finite, got inf"):
        replace(weights, router_bias=np.full(12, np.inf)).check(config)


def test_short_spelling_and_kind_must_agree():
    assert make_config(RouterKind()).router_kind == RouterKind()
    assert make_config(RouterKind(renormalize=True)).router_kind == RouterKind(renormalize=True)
    with pytest.raises(ValueError, match="renormalize must say what RouterKind says, True, got False"):
        make_config(RouterKind(renormalize=True), renormalize=False)


def test_groups_of_no_experts_are_refused():
    kind = RouterKind(num_always=3, num_groups=2, num_topk_groups=2)
    with pytest.raises(ValueError, match="num_groups must divide the 0 experts chosen from, got 2"):
        make_config(kind, num_experts=3, num_topk=3)
    make_config(replace(kind, num_groups=1, num_topk_groups=1), num_experts=3, num_topk=3)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus", "sparsemixer"])
def test_a_logit_that_overflows_by_its_bias_or_scale_spoils_its_row(score):
    """In the type of sums, as kernels have it, though the reference computes in float64."""
    biased = RouterKind(score=score, logit_bias=True)
    for dtype, largest in (("float32", 3.0e38), ("float64", 1.7e308)):
        config, _, weights = make_case(biased, dtype=dtype)
        logits = np.zeros((3, 12))
        logits[1, 4], logits[2, 4] = largest, -largest
        bias = np.zeros(12)
        bias[4] = largest
        weights = replace(weights, router_bias=bias)
        for case, values in ((biased, logits), (RouterKind(score=score, logit_scale=2.0), logits)):
            routing = route_logits(values, replace(config, router=case), weights)
            assert np.isnan(routing.topk_weights).all(axis=1).tolist() == [False, True, False], (dtype, case)
            assert routing.topk_idx[1].tolist() == [0, 1, 2]
            assert np.isfinite(routing.topk_weights[[0, 2]]).all()
            single = choose(values.astype(dtype), case, 3, weights)
            np.testing.assert_array_equal(np.isnan(single.topk_weights), np.isnan(routing.topk_weights))
        below = replace(config, router=RouterKind(score=score, logit_scale=2.0))
        assert np.isnan(route_logits(np.full((1, 12), -largest), below).topk_weights).all(), "all -inf"


def test_a_cap_makes_an_overflow_finite():
    config, _, weights = make_case(RouterKind(score="sigmoid", logit_scale=2.0, logit_cap=0.5), dtype="float32")
    logits = np.zeros((1, 12))
    logits[0, 4] = 3e38
    routing = route_logits(logits, config, weights)
    assert routing.topk_idx[0, 0] == 4
    np.testing.assert_allclose(routing.topk_weights[0], [1 / (1 + math.exp(-0.5)), 0.5, 0.5])


def test_sparsemixer_has_no_weight_for_a_logit_of_minus_infinity():
    logits = np.full((1, 12), -np.inf)
    logits[0, 5], logits[0, 7] = 1, 2
    routing = choose(logits, KINDS["sparsemixer"], 3)
    assert routing.topk_idx[0].tolist() == [7, 5, 0]
    assert np.isfinite(routing.topk_weights[0]).tolist() == [True, True, False]
    assert np.isnan(routing.topk_weights[0, 2])


@pytest.mark.parametrize(("fields", "dtype", "message"), [
    (dict(scale=1e300), "float32", r"scale must be in \[-3.4e\+38, 3.4e\+38\] for sums in float32, got 1e\+300"),
    (dict(scale=-1e39), "bfloat16", "scale must be in .* for sums in float32"),
    (dict(logit_scale=1e-320), "float64", r"logit_scale must be in \[2.23e-308, 1.8e\+308\] for sums in float64"),
    (dict(logit_cap=1e-46), "float16", "logit_cap must be in .* for sums in float32"),
    (dict(renormalize=True, norm_eps=1e39), "float32", "norm_eps must be in .* for sums in float32"),
])  # fmt: skip
def test_numbers_that_the_type_of_sums_cannot_hold_are_refused(fields, dtype, message):
    with pytest.raises(ValueError, match=message):
        make_config(RouterKind(**fields), dtype=dtype)
    make_config(RouterKind(renormalize=True, norm_eps=1e-50, scale=-3e38, logit_scale=1e-37), dtype="float32")


def test_numbers_of_experts_that_the_type_of_sums_cannot_hold_are_refused():
    kind = ExpertKind(activation="silu", gated=True, slope=1e-40)
    with pytest.raises(ValueError, match=r"slope must be in .* for sums in float32, got 1e-40"):
        make_config(RouterKind(), dtype="float32", expert=kind)
    with pytest.raises(ValueError, match=r"slope must be in .* for sums in float32, got 1e-40"):
        make_config(RouterKind(), dtype="float32", expert=replace(kind, slope=1.0), shared_ffn=3, shared_expert=kind)
    make_config(RouterKind(), dtype="float64", expert=kind)
