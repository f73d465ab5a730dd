"""Gradients against central differences of `moe_layer`, and what they promise on the edges."""

from dataclasses import dataclass, field, fields, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kinds import EXPERTS, NORMED, ROUTERS, expert_kinds, router_kinds

from reference import (
    ACTIVATIONS,
    ExpertKind,
    MoEConfig,
    RouterKind,
    Weights,
    make_packets,
    moe_layer,
    moe_layer_backward,
)
from reference.layer import source_routings

STEP, CLOSE = 1e-5, 1e-6


@dataclass
class Case:
    """A layer, its input as lists by rank, and the gradient of its results."""

    config: MoEConfig
    counts: list
    seed: int = 0
    bias: bool = True
    routing: dict = field(default_factory=dict)

    def __post_init__(self):
        rng, c = np.random.default_rng(self.seed), self.config
        self.weights = Weights.random(c, seed=self.seed, bias=self.bias)
        self.x, self.dy = ([rng.standard_normal((n, c.hidden)) for n in self.counts] for _ in range(2))
        if c.router_kind.choice == "given":
            self.routing["topk_idx"] = self.with_gaps(rng)

    def with_gaps(self, rng):
        """Any experts, and here and there none."""
        orders = [np.argsort(rng.random((n, self.config.num_choices)), axis=1) for n in self.counts]
        return [np.where(rng.random(o.shape) < 0.1, -1, o)[:, : self.config.num_topk] for o in orders]

    def give_routing(self):
        """Experts and weights, of both signs, instead of the router's own; some pairs are no choice."""
        rng = np.random.default_rng(self.seed + 1)
        idx = self.with_gaps(rng)
        self.routing = dict(topk_idx=idx, topk_weights=[rng.uniform(0.2, 1, i.shape) * (1 - 2 * (i % 2)) for i in idx])

    def give_logits(self):
        rng = np.random.default_rng(self.seed + 1)
        self.routing["logits"] = [rng.standard_normal((n, self.config.num_choices)) for n in self.counts]

    def gradients(self, **more):
        return moe_layer_backward(self.x, self.dy, self.weights, self.config, **self.routing, **more)

    def loss(self):
        y = moe_layer(self.x, self.weights, self.config, **self.routing)
        return sum((a * b).sum() for a, b in zip(self.dy, y, strict=True))

    def idx(self):
        arguments = (self.routing.get(name) for name in ("topk_idx", "topk_weights", "logits"))
        return [r.topk_idx.tolist() for r in source_routings(self.x, self.weights, self.config, *arguments)]

    def inputs(self, gradients):
        """(name, array, its gradient) of all that has one."""
        yield from ((f"x[{rank}]", *pair) for rank, pair in enumerate(zip(self.x, gradients.x, strict=True)))
        for name in [f.name for f in fields(Weights)]:
            if isinstance(getattr(self.weights, name), np.ndarray):
                yield name, getattr(self.weights, name), getattr(gradients.weights, name)
        for name in ("topk_weights", "logits"):
            for part, gradient in zip(self.routing.get(name, []), getattr(gradients, name) or [], strict=False):
                yield name, part, gradient

    def rise(self, array, way, step):
        """Of the loss along `way`, by a central difference."""
        kept, ends = array.copy(), []
        for sign in (1, -1):
            array[...] = kept + sign * step * way
            ends.append(self.loss())
        array[...] = kept
        return (ends[0] - ends[1]) / (2 * step)

    def check(self, sure=True):
        """All gradients, along a way that is in no direction of its own."""
        rng, gradients, seen = np.random.default_rng(self.seed + 2), self.gradients(), set()
        for name, array, gradient in self.inputs(gradients):
            assert gradient.shape == array.shape and gradient.dtype == np.float64, name
            way = rng.standard_normal(array.shape)
            expected, found = self.rise(array, way, STEP), (gradient * way).sum()
            size = np.abs(gradient * way).sum() + 0.01
            if not sure:  # a choice or a bound that changes on the way
                assume(abs(self.rise(array, way, STEP / 4) - expected) <= CLOSE / 4 * size)
            assert abs(found - expected) <= CLOSE * size, f"{self.config}: {name}: {found}, by differences {expected}"
            seen |= {name} if gradient.any() else set()
        return seen


def make_config(**changes):
    sizes = dict(num_ranks=2, num_tokens=7, hidden=9, ffn=5, num_experts=6, num_topk=3, dtype="float64")
    return MoEConfig(**(sizes | dict(expert=ExpertKind(activation="silu", gated=True)) | changes))


def router_config(kind, **changes):
    more = kind.num_always
    return make_config(**(dict(num_ranks=1, num_experts=12 + more, num_topk=3 + more, router=kind) | changes))


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name, capacity):
    """With a capacity a dropped pair is in the norm and adds nothing."""
    case = Case(router_config(ROUTERS[name], capacity=capacity), [7])
    seen, kind = case.check(), ROUTERS[name]
    assert seen >= {"x[0]", "router", "up_bias", "down_bias", *(["router_bias"] if kind.logit_bias else [])}
    assert "selection_bias" not in seen and ("expert_scale" in seen) == kind.expert_scale
    assert capacity is None or any(make_packets(np.array(idx), case.config).dropped for idx in case.idx())


SHARED = dict(shared_ffn=3, shared_gate=True)
PLAIN = {
    f"{a}, {'gated' if g else 'plain'}": ExpertKind(activation=a, gated=g) for a in ACTIVATIONS for g in (0 > 1, True)
}


STEEP = {"steep": replace(EXPERTS["inkling2"], slope=1.702, up_offset=-0.25)}


@pytest.mark.parametrize("name", [*PLAIN, *EXPERTS, *STEEP, "normed"])
def test_experts(name):
    kind = (PLAIN | EXPERTS | STEEP | {"normed": NORMED})[name]
    case = Case(make_config(expert=kind, **(SHARED if name != "normed" else {})), [7, 3])
    seen = case.check()
    assert seen >= {"x[0]", "x[1]", "router", "up_proj", "down_proj", "up_bias", "down_bias"}
    assert name == "normed" or seen >= {"shared_up_proj", "shared_down_proj", "shared_gate_weight"}


MORE = {
    "every expert": dict(num_topk=6, capacity=2),
    "one": dict(num_topk=1, num_experts=2, num_tokens=1, hidden=1, ffn=1),
    "shared without a gate": dict(shared_ffn=4),
    "shared of another kind": SHARED | dict(shared_expert=EXPERTS["inkling2"]),
    "zero experts": dict(num_zero=5, num_topk=5, renormalize=False),
    "zero experts that add nothing": dict(num_zero=5, num_topk=5, zero="none"),
    "weights on the input": dict(router=RouterKind(score="sigmoid", weight_input=True), num_zero=3, **SHARED),
    "a norm behind weights on the input": dict(router=RouterKind(weight_input=True), expert=NORMED),
    "a norm that is not reached": dict(router=RouterKind(renormalize=True, norm_min=0.9)),
}


@pytest.mark.parametrize("routing", ["own", "given", "of logits"])
@pytest.mark.parametrize("name", MORE)
def test_layers(name, routing):
    config = make_config(**MORE[name])
    case = Case(
        config, [config.num_tokens, 0] if "norm" in name else [config.num_tokens, 1], seed=3, bias="one" not in name
    )
    if routing == "given":
        case.give_routing()
    if routing == "of logits":
        case.give_logits()
    seen = case.check()
    assert ("router" in seen) == (routing == "own" and name != "one")  # one chosen weight is 1, whatever its logit
    assert ("topk_weights" in seen) == (routing == "given")
    assert ("logits" in seen) == (routing == "of logits" and name != "one")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_layer(data):
    """All kinds in any combination."""
    num_experts, num_zero = data.draw(st.sampled_from([1, 2, 6])), data.draw(st.sampled_from([0, 3]))
    num_topk = data.draw(st.integers(1, num_experts + num_zero))
    router = data.draw(router_kinds(num_experts, num_topk, ("logits", "score", "given"), num_zero))
    expert = data.draw(expert_kinds())
    shared = data.draw(st.sampled_from([{}, dict(shared_ffn=3), SHARED]))
    config = make_config(
        num_ranks=1, num_experts=num_experts, num_zero=num_zero, num_topk=num_topk, router=router, expert=expert,
        capacity=data.draw(st.sampled_from([None, 2])), zero=data.draw(st.sampled_from(["identity", "none"])), **shared,
    )  # fmt: skip
    Case(config, [5], data.draw(st.integers(0, 1000)), data.draw(st.booleans())).check(sure=False)


def test_weights_of_the_router_have_the_gradients_that_given_ones_have():
    case = Case(make_config(capacity=2, num_zero=2, renormalize=False), [7, 5])
    own = case.gradients()
    arguments = (case.routing.get(name) for name in ("topk_idx", "topk_weights", "logits"))
    routings = source_routings(case.x, case.weights, case.config, *arguments)
    case.routing = dict(topk_idx=[r.topk_idx for r in routings], topk_weights=[r.topk_weights for r in routings])
    given = case.gradients()
    assert given.logits is None and not given.weights.router.any()
    for a, b in zip(own.topk_weights, given.topk_weights, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(own.weights.up_proj, given.weights.up_proj)
    for x, part, more, rest in zip(case.x, own.x, own.logits, given.x, strict=True):
        np.testing.assert_allclose(part, rest + more @ case.weights.router, rtol=1e-12, atol=1e-14)
        assert x.shape == part.shape


def test_what_a_loss_reads_of_logits_goes_through_the_router():
    case = Case(make_config(router=RouterKind(logit_bias=True, logit_scale=2.0), num_ranks=1), [5])
    more = np.random.default_rng(4).standard_normal((5, 6))
    plain, added = case.gradients(), case.gradients(logits_gradient=[more])
    np.testing.assert_allclose(added.logits[0], plain.logits[0] + more, rtol=1e-13)
    np.testing.assert_allclose(added.x[0], plain.x[0] + more @ case.weights.router, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(added.weights.router, plain.weights.router + more.T @ case.x[0], rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(added.weights.router_bias, plain.weights.router_bias)
    case.give_logits()
    np.testing.assert_array_equal(case.gradients(logits_gradient=[more]).x[0], case.gradients().x[0])


def test_forms_of_x_agree():
    case = Case(make_config(), [7, 7])
    listed = case.gradients()
    stacked = moe_layer_backward(np.stack(case.x), np.stack(case.dy), case.weights, case.config)
    flat = moe_layer_backward(np.concatenate(case.x), np.concatenate(case.dy), case.weights, case.config)
    np.testing.assert_array_equal(stacked.x, np.stack(listed.x))
    np.testing.assert_allclose(flat.x, np.concatenate(listed.x), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(flat.weights.down_proj, listed.weights.down_proj, rtol=1e-11, atol=1e-13)
    assert [part.shape for part in flat.topk_weights + flat.logits] == [(14, 3), (14, 6)]


def given_case(**changes):
    """Token 0 goes to experts 0 and 1, token 1 loses all pairs, token 2 has none but one of weight 0, token 3 all."""
    case = Case(make_config(num_ranks=1, num_experts=3, num_topk=2, capacity=1, **changes), [4])
    idx = np.array([[0, 1], [1, 0], [-1, 3], [2, 1]])
    case.routing = dict(topk_idx=[idx], topk_weights=[np.array([[0.5, -2.0], [1.0, 3.0], [7.0, np.nan], [0.25, 1.0]])])
    return case


def test_pairs_that_add_nothing_have_no_gradient():
    case = given_case()
    found = case.gradients()
    assert not found.x[0][1:3].any() and found.x[0][0].any() and found.x[0][3].any()
    assert (found.topk_weights[0] != 0).tolist() == [[True, True], [False, False], [False, False], [True, False]]
    case.x[0][1:3], case.dy[0][1:3] = np.nan, np.inf
    worse = case.gradients()
    np.testing.assert_array_equal(worse.x[0], found.x[0])
    np.testing.assert_array_equal(worse.weights.up_proj, found.weights.up_proj)
    case.routing["topk_weights"][0][3, 0] = 0.0
    zero = case.gradients()
    assert not zero.x[0][3].any() and not zero.topk_weights[0][3].any() and not zero.weights.up_proj[2].any()


@pytest.mark.parametrize("where", ["x", "dy"])
def test_what_is_not_finite_spoils_its_own_token_and_what_sums_over_it(where):
    case = Case(make_config(num_experts=12, num_ranks=1, **SHARED, router=RouterKind(logit_bias=True)), [6])
    before, idx = case.gradients(), case.idx()[0]
    getattr(case, where)[0][2, 4] = np.nan
    after = case.gradients()
    others = [0, 1, 3, 4, 5]
    for a, b in ((before.x, after.x), (before.topk_weights, after.topk_weights), (before.logits, after.logits)):
        np.testing.assert_allclose(b[0][others], a[0][others], rtol=1e-12, atol=1e-14)
        assert np.isnan(b[0][2]).all()
    touched = case.idx()[0][2]  # of NaN logits the first experts
    for expert in range(12):
        spoilt = np.isnan(after.weights.up_proj[expert]).all(), np.isnan(after.weights.down_proj[expert]).any()
        assert spoilt == ((True, True) if expert in touched else (False, False)), expert
    assert np.isnan(after.weights.shared_up_proj).all() and np.isnan(after.weights.router).all() and idx


def test_logits_that_are_not_finite():
    """Of a masked expert, -inf, the gradient is 0; a row without a largest finite logit has none that is finite."""
    scaled = RouterKind(score="sigmoid", logit_cap=2.0, expert_scale=True)
    for kind in (RouterKind(), scaled, RouterKind(score="sqrt_softplus")):
        case = Case(router_config(kind), [4])
        case.give_logits()
        case.routing["logits"][0][0, 5], case.routing["logits"][0][1, 3] = -np.inf, np.inf
        found = case.gradients()
        assert found.logits[0][0, 5] == 0 and np.isfinite(found.logits[0][[0, 2, 3]]).all(), kind
        assert np.isnan(found.logits[0][1]).all() and np.isnan(found.x[0][1]).all()
        assert np.isfinite(found.x[0][[0, 2, 3]]).all()
        if kind.expert_scale:  # a row that cannot be routed goes to the first experts
            assert np.isnan(found.weights.expert_scale).tolist() == [True] * 3 + [False] * 9


@pytest.mark.parametrize(("kind", "gate", "expected"), [
    (ExpertKind(activation="relu", gated=True), [-1.0, 0.0, 1.0], [0, 0, 1]),
    (ExpertKind(activation="relu2", gated=True), [-1.0, 0.0, 1.5], [0, 0, 3]),
    (ExpertKind(activation="identity", gated=True, bound="clamp", gate_limit=2.0), [1.0, 2.0, 2.5], [1, 1, 0]),
    (ExpertKind(activation="relu", gated=True, bound="clamp_activated", gate_limit=2.0), [1.0, 2.0, 2.5], [1, 1, 0]),
])  # fmt: skip
def test_slopes_at_limits_are_those_of_pytorch(kind, gate, expected):
    from reference.expert_gradients import slopes

    gate_slope, up_slope = slopes([np.array(gate), np.ones(3)], kind)
    np.testing.assert_array_equal(gate_slope, expected)
    clamped = replace(kind, bound="clamp", up_limit=1.0)
    _, up_slope = slopes([np.ones(5), np.array([-1.5, -1, 0, 1, 1.5])], clamped)
    np.testing.assert_array_equal(up_slope, [0, 1, 1, 1, 0])


def test_rows_beyond_the_element_type_become_infinite():
    """The gradient of a product is 70,000 and that of a token small, or the other way round."""
    kind = ExpertKind(activation="identity", gated=False)
    config = make_config(num_ranks=1, num_experts=1, num_topk=1, hidden=1, ffn=1, expert=kind, dtype="float16")
    arrays = {name: np.ones((1, 1, 1), np.float16) for name in ("up_proj", "down_proj")}
    weights = Weights(router=np.zeros((1, 1), np.float16), **arrays)
    one, idx = np.ones((1, 1), np.float16), np.zeros((1, 1), int)
    small = replace(weights, up_proj=np.float16([[[0.125]]]))
    for those, factor, dx in ((weights, 7e4, np.inf), (small, 7e4, np.inf), (weights, 6e4, 6e4)):
        found = moe_layer_backward(one, one, those, config, idx, np.array([[factor]], np.float32))
        assert found.x[0, 0] == dx and found.topk_weights[0][0, 0] == those.up_proj[0, 0, 0]
        assert np.isinf(found.weights.up_proj).all() == np.isinf(dx)


def test_infinite_rows_of_a_token_are_added_as_they_are():
    """Rows of 80,000 and -80,000, whose sum would be 0: there is no number between the infinities that they become."""
    kind = ExpertKind(activation="identity", gated=False)
    config = make_config(num_ranks=1, num_experts=2, num_topk=2, hidden=1, ffn=1, expert=kind, dtype="float16")
    up, down = np.full((2, 1, 1), 8, np.float16), np.ones((2, 1, 1), np.float16)
    weights = Weights(router=np.zeros((2, 1), np.float16), up_proj=up, down_proj=down)
    one, factors = np.ones((1, 1), np.float16), np.array([[1e4, -1e4]], np.float32)
    assert np.isnan(moe_layer_backward(one, one, weights, config, np.array([[0, 1]]), factors).x).all()


@pytest.mark.parametrize(("changes", "error", "message"), [
    (dict(dy=[np.zeros((2, 9)), np.zeros((1, 9))]), ValueError, r"dy\[0\] must have shape \[3, 9\], got \[2, 9\]"),
    (dict(dy=[np.zeros((3, 9))]), ValueError, "dy must have as many parts as x, 2, got 1"),
    (dict(dy=[np.zeros((3, 9), int)] * 2), TypeError, r"dy\[0\] must have a floating dtype"),
    (dict(logits_gradient=[np.zeros((3, 5))] * 2), ValueError, r"logits_gradient\[0\] must have shape \[3, 6\]"),
    (dict(topk_idx=[np.zeros((3, 1), int)] * 2), ValueError, "topk_idx is given, but topk_weights is not"),
])  # fmt: skip
def test_wrong_arguments_are_named(changes, error, message):
    case = Case(make_config(num_topk=1), [3, 3])
    arguments = dict(x=case.x, dy=case.dy, weights=case.weights, config=case.config) | changes
    with pytest.raises(error, match=message):
        moe_layer_backward(**arguments)


def test_logits_that_nobody_reads_have_no_gradient():
    case = given_case()
    with pytest.raises(ValueError, match="logits_gradient must be None if topk_weights is given"):
        case.gradients(logits_gradient=[np.zeros((4, 3))])
