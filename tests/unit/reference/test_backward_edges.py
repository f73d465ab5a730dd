"""What gradients promise on the edges: forms of arguments, pairs that add nothing, NaN, limits of slopes and types."""

from dataclasses import replace

import numpy as np
import pytest
from gradient_cases import SHARED, Case, make_config, router_config

from reference import ExpertKind, RouterKind, Weights, moe_layer_backward
from reference.expert_gradients import slopes
from reference.layer import source_routings


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


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_only_choice_that_is_divided_by_itself_has_no_gradient(score):
    """Its weight is 1; not the largest logit, so that its score is not 1."""
    router = RouterKind(choice="given", score=score, renormalize=True)
    case = Case(make_config(num_topk=1, router=router), [7, 5])
    case.routing = dict(topk_idx=[np.argmin(x @ case.weights.router.T, axis=1)[:, None] for x in case.x])
    found = case.gradients()
    assert all(part.any() for part in found.topk_weights)
    assert not any(part.any() for part in found.logits) and not found.weights.router.any()


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


def test_an_identity_of_weight_0_has_no_gradient():
    case = Case(make_config(num_ranks=1, num_experts=1, num_topk=2, num_zero=1), [2])
    case.routing = dict(topk_idx=[np.array([[0, 1], [0, 1]])], topk_weights=[np.array([[1.0, 0.0], [1.0, 2.0]])])
    assert (case.gradients().topk_weights[0] != 0).tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("where", ["x", "dy"])
def test_what_is_not_finite_spoils_its_own_token_and_what_sums_over_it(where):
    case = Case(make_config(num_experts=12, num_ranks=1, **SHARED, router=RouterKind(logit_bias=True)), [6])
    before = case.gradients()
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
    assert np.isnan(after.weights.shared_up_proj).all() and np.isnan(after.weights.router).all()


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
    one, idx = np.ones((1, 1), np.float16), np.array([[0, 1]])
    for factors, dx in (([1e4, -1e4], np.nan), ([5e3, 5e3], np.inf), ([5e3, 2e3], 56000.0)):
        found = moe_layer_backward(one, one, weights, config, idx, np.array([factors], np.float32))
        np.testing.assert_array_equal(found.x, [[dx]])


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
