"""The router's backward at the limits of its formulas, and what its bits do not depend on."""

from dataclasses import replace

import numba
import numpy as np
import pytest
from cases import assert_same_bits
from routed import KINDS, TARGETS, Router, make_case, route_all_back

from reference import RouterKind
from reference.router_gradients import router_backward


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", KINDS)
def test_ties_and_bad_rows_are_those_of_the_reference(name, target):
    """With logits that are exact, of which some are infinite or NaN."""
    kind = replace(KINDS[name], selection_bias=False, logit_bias=False, num_topk_groups=KINDS[name].num_groups)
    router = Router(kind, num_topk=7)
    logits, topk_idx, _, gradients = make_case(router, 9)
    logits = np.random.default_rng(0).integers(-2, 3, logits.shape) / 2.0
    logits[1], logits[2, 3], logits[3, 5], logits[4], logits[5, ::2] = 0, np.nan, np.inf, -np.inf, -np.inf
    logits[6], logits[7] = -300, 300 * (np.arange(logits.shape[1]) % 2)
    topk_idx, topk_weights = router.route(logits, topk_idx if kind.choice == "given" else None)
    gradients[(topk_idx < 0) | (topk_weights == 0)] = 0
    got, scales = router.back(logits, topk_idx, topk_weights, gradients, target)
    expected, arrays = router_backward(logits, topk_idx, gradients.astype(float), router.weights, router.config)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-13 * abs(kind.scale))
    if kind.expert_scale:
        np.testing.assert_allclose(scales, arrays["expert_scale"], rtol=1e-12)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v4", "dbrx", "phimoe", "everything", "gemma4"])
def test_a_token_that_is_spoilt_spoils_no_other(name, target):
    """By its logits, or by a bias or scale that takes them out of range, or by a gradient that came in."""
    router = Router(replace(KINDS[name], logit_scale=4.0))
    logits, topk_idx, topk_weights, gradients = make_case(router)
    clean, _ = router.back(logits, topk_idx, topk_weights, gradients, target)
    logits[0, 3], logits[1, 5], logits[2], logits[3, 1] = np.nan, np.inf, -np.inf, 1e308
    gradients[4, 1] = np.nan
    got, scales = router.back(logits, topk_idx, topk_weights, gradients, target)
    spoilt = [0, 1, 2] if router.kind.logit_cap else [0, 1, 2, 3]  # a cap takes an infinity in
    assert np.isnan(got[spoilt]).all() and np.isnan(got[4, topk_idx[4, 1]])
    assert_same_bits(got[5:], clean[5:])
    if router.kind.logit_cap:
        assert np.isfinite(got[3]).all() and got[3, 1] == 0
    if router.kind.expert_scale:
        np.testing.assert_array_equal(np.flatnonzero(np.isnan(scales)), topk_idx[4, 1])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("norm", [{}, dict(renormalize=True, norm_order=2.0)])
def test_a_logit_of_minus_infinity_has_no_gradient(norm, score, target):
    """Nor does it change others', be it chosen or not."""
    router = Router(RouterKind(score=score, **norm), num_topk=5)
    logits, *_, gradients = make_case(router)
    logits[:, 4:] = -np.inf
    topk_idx, topk_weights = router.route(logits)
    got, _ = router.back(logits, topk_idx, topk_weights, gradients, target)
    assert (got[:, 4:] == 0).all() and (topk_idx[:, 4:] >= 4).all()
    logits[:, 4:] = -700
    far, _ = router.back(logits, topk_idx, topk_weights, gradients, target)
    np.testing.assert_allclose(got[:, :4], far[:, :4], rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("score", ["sigmoid", "sqrt_softplus"])
def test_scores_that_are_nearly_zero_divide_by_no_zero(score, target):
    """In float32 their squares underflow, and so does a product of two: a gradient by parts is that of a softmax."""
    router = Router(RouterKind(score=score, renormalize=True), np.float32, num_topk=5)
    logits, *_, gradients = make_case(router)
    topk_idx, topk_weights = router.route(logits - np.float32(80))
    got, _ = router.back(logits - np.float32(80), topk_idx, topk_weights, gradients, target)
    exact = Router(RouterKind(renormalize=True), num_topk=5)
    root = 2 if score == "sqrt_softplus" else 1  # of scores that are exp(z / root)
    rounded = (logits - np.float32(80)).astype(np.float64)
    expected, _ = exact.back(rounded / root, topk_idx, topk_weights, gradients, target)
    np.testing.assert_allclose(got, expected / root, rtol=0, atol=1e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("order", [1.0, 2.0])
def test_scores_that_are_all_zero_have_no_norm_to_change(order, target):
    kind = RouterKind(score="sigmoid", renormalize=True, norm_order=order)
    logits = np.full((1, 12), -1e4)
    for norm_eps, expected in ((0.1, 0), (0.0, np.nan)):
        router = Router(replace(kind, norm_eps=norm_eps))
        topk_idx, topk_weights = router.route(logits)
        np.testing.assert_array_equal(topk_weights, expected)
        got, _ = router.back(logits, topk_idx, topk_weights, np.ones((1, 3)), target)
        np.testing.assert_array_equal(got, [[expected] * 3 + [0] * 9])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("order", [1.0, 2.0])
def test_experts_that_do_not_matter_get_nothing_at_all(order, target):
    """The chosen ones divided by their norm are the same whatever logits the others have."""
    router = Router(RouterKind(renormalize=True, norm_order=order))
    logits, topk_idx, topk_weights, gradients = make_case(router)
    got, _ = router.back(logits, topk_idx, topk_weights, gradients, target)
    chosen = (topk_idx[:, :, None] == np.arange(12)).any(axis=1)
    assert (got[~chosen] == 0).all() and (np.abs(got[chosen]) > 0).all()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("least", [1.0, 1.5, np.nextafter(1.5, 2), 2.0])
def test_a_norm_has_a_gradient_from_its_least_value_on(least, target):
    """As a clamp has, at its limit too: three scores of 1/2, of which one is asked for more."""
    router = Router(RouterKind(score="sigmoid", renormalize=True, norm_min=least))
    logits = np.zeros((1, 12))
    got, _ = router.back(logits, *router.route(logits), np.array([[3.0, 0, 0]]), target)
    expected = [1 / 3, -1 / 6, -1 / 6] if least <= 1.5 else [3 / 4 / least, 0, 0]
    np.testing.assert_allclose(got[0, :3], expected, rtol=1e-15)


@pytest.mark.parametrize("target", TARGETS)
def test_a_layer_of_one_expert(target):
    router = Router(RouterKind(score="sigmoid", logit_bias=True, expert_scale=True), num_topk=1, chosen_from=1)
    logits, topk_idx, topk_weights, gradients = make_case(router)
    got, scales = router.back(logits, topk_idx, topk_weights, gradients, target)
    expected, arrays = router_backward(logits, topk_idx, gradients.astype(float), router.weights, router.config)
    np.testing.assert_allclose(got, expected, rtol=1e-13)
    np.testing.assert_allclose(scales, arrays["expert_scale"], rtol=1e-13)


@pytest.mark.parametrize("target", TARGETS)
def test_a_scale_of_zero_has_no_gradient(target):
    """Its weight is 0, which has none; that of another token is 1."""
    router = Router(KINDS["gemma4"], num_topk=1, chosen_from=2)
    router.rule = router.rule._replace(expert_scale=np.array([0.0, 1.0]))
    logits = np.array([[2.0, 1.0], [1.0, 2.0]])
    topk_idx, topk_weights = router.route(logits)
    np.testing.assert_array_equal(topk_weights, [[0], [1]])
    _, scales = router.back(logits, topk_idx, topk_weights, np.array([[0], [0.7]]), target)
    np.testing.assert_array_equal(scales, [0, 0.7])


def test_no_float32_is_widened():
    router = Router(KINDS["everything"], np.float32)
    router.back(*make_case(router), "compiled")
    for types, made in route_all_back.overloads.items():
        if types[-1].dtype == numba.float32:
            assert "fpext" not in made.library.get_llvm_str()


@pytest.mark.parametrize("num_lanes", [1, 2, 5])
def test_bits_do_not_depend_on_who_does_it(num_lanes):
    router = Router(KINDS["everything"], np.float32)
    case = make_case(router)
    expected = router.back(*case, "interpreted")
    for got, part in zip(router.back(*case, "interpreted", num_lanes=num_lanes), expected, strict=True):
        assert_same_bits(got, part)


def test_sums_of_several_calls_go_on_where_they_were():
    """In the order of pairs: tokens in two calls, or in one."""
    router = Router(KINDS["everything"], np.float32)
    case = make_case(router, 40)
    _, expected = router.back(*case, "compiled")
    _, scales = router.back(*(part[:17] for part in case), "compiled")
    _, scales = router.back(*(part[17:] for part in case), "compiled", scales=scales)
    assert_same_bits(scales, expected)
