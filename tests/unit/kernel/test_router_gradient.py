"""The router's backward, interpreted and compiled, against differences of the router itself, and its roundings."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kinds import router_kinds
from routed import KINDS, TARGETS, Router, make_case

from reference.router_gradients import router_backward
from reference.routers import prepared_logits, scores_of

STEP = 1e-4  # of differences of fourth order: off by 1e-16 f''''' / 30 and, by roundings, some 1e-16 f / 1e-4


def difference(loss, number):
    """Derivatives of `loss(i, step)`, whatever moves by the step, for i below `number`: the last axis."""
    moved = {step: [loss(i, step * STEP) for i in range(number)] for step in (-2, -1, 1, 2)}
    slope = [np.subtract(moved[step], moved[-step]) for step in (1, 2)]
    return np.moveaxis((8 * slope[0] - slope[1]) / (12 * STEP), 0, -1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sizes", [{}, dict(num_zero=5), dict(num_topk=12), dict(num_topk=1)], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_gradients_are_differences_of_the_router(name, sizes, target):
    kind = KINDS[name]
    if sizes.get("num_topk") == 12:  # of all groups, then
        kind = replace(kind, num_topk_groups=kind.num_groups)
    if kind.num_always:
        sizes = {name: size for name, size in sizes.items() if name != "num_zero"}
    router = Router(kind, **sizes)
    logits, topk_idx, topk_weights, gradients = make_case(router)
    given = topk_idx if kind.choice == "given" else None

    def loss(moved, rule=None):
        """Of each token, if it chooses the same experts, be it in another order."""
        idx, weights = router.route(moved, given, rule)
        same = idx[:, :, None] == topk_idx[:, None, :]
        assert (same | (idx < 0)[:, :, None]).any(axis=2).all(), "the step is too large for this case"
        return np.einsum("tij,ti,tj->t", same, weights, gradients)

    def moved_logits(e, step):
        return loss(logits + step * (np.arange(logits.shape[1]) == e))

    def moved_scales(e, step):
        scales = router.rule.expert_scale + step * (np.arange(logits.shape[1]) == e)
        return loss(logits, router.rule._replace(expert_scale=scales)).sum()

    rng = np.random.default_rng(2)
    before, scales = rng.standard_normal(logits.shape), rng.standard_normal(logits.shape[1])
    got, got_scales = router.back(logits, topk_idx, topk_weights, gradients, target, before, scales)
    expected = difference(moved_logits, logits.shape[1])
    size = np.abs(expected).max()
    np.testing.assert_allclose(got - before, expected, rtol=0, atol=1e-9 * max(size, 1))
    if kind.expert_scale:
        expected = difference(moved_scales, logits.shape[1])
        np.testing.assert_allclose(got_scales - scales, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def terms(router, logits, topk_idx, gradients):
    """`[num_tokens, num_choices]`: sums of the sizes of all that is added up to a gradient, or more."""
    kind, rule, chosen = router.kind, router.rule, topk_idx >= 0
    z = prepared_logits(logits, kind, router.weights, np.dtype(np.float64))
    if kind.score == "softmax":
        z = z - z.max(axis=1, keepdims=True)
        scores = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    else:
        scores = scores_of(z, kind)
    sizes = np.abs(gradients * rule.scale * (rule.expert_scale[topk_idx] if kind.expert_scale else 1))
    if kind.score == "sparsemixer":
        return 2 * rule.logit_scale * np.ones_like(z) * sizes.sum(axis=1, keepdims=True)
    parts = np.where(chosen, np.take_along_axis(scores, topk_idx * chosen, axis=1), 0)
    if kind.renormalize:
        norm = (parts**rule.norm_order).sum(axis=1, keepdims=True) ** (1 / rule.norm_order)
        parts = parts / np.where(chosen.any(axis=1, keepdims=True), np.maximum(norm + rule.norm_eps, rule.norm_min), 1)
    common = (sizes * parts).sum(axis=1, keepdims=True)
    found = scores * common * (kind.score == "softmax")
    for j in range(topk_idx.shape[1]):
        found[np.arange(len(z)), topk_idx[:, j]] += parts[:, j] * (sizes + common)[:, j] * chosen[:, j]
    return found * rule.logit_scale


def most_ulps(router, logits):
    """Units in the last place of a gradient's terms, at most: each rounding of a term counts once.

    A logit x that is off by n ulps moves an exponential by n |x|, and there are two of them in a score. A score is off
    by a sum of exponentials and by 6 (test_formulas.py). A term has as factors its score twice, two norms, which are
    sums of scores, and another sum of them; a slope; and some 20 products and sums of choices.
    """
    kind, rule = router.kind, router.rule
    x = (logits + (rule.logit_bias if kind.logit_bias else 0)) * rule.logit_scale
    largest = np.abs(x).max(axis=1, keepdims=True)
    of_a_logit = kind.logit_bias + (kind.logit_scale != 1) + (6 if kind.logit_cap else 0)
    score = (2 * of_a_logit + 1) * largest + (logits.shape[1] if kind.score == "softmax" else 0) + 6
    slope = of_a_logit * largest + 12 + (6 * largest / kind.logit_cap if kind.logit_cap else 0)
    return 6 * score + slope + 20 + 4 * router.config.num_topk


def assert_equals_oracle(router, case, target):
    """Gradients are within their roundings of those of the reference."""
    logits, topk_idx, _, gradients = case
    got, got_scales = router.back(*case, target)
    logits, gradients = logits.astype(np.float64), gradients.astype(np.float64)
    expected, arrays = router_backward(logits, topk_idx, gradients, router.weights, router.config)
    unit, sizes = np.finfo(router.real).eps / 2, terms(router, logits, topk_idx, gradients)
    bound = unit * most_ulps(router, logits) * sizes
    off = np.abs(got - expected)
    assert (off <= bound).all(), f"{router.kind}: off by {off.max()}, {(off / bound).max()} of the bound"
    if router.kind.expert_scale:
        bound = unit * (len(logits) + 2 + most_ulps(router, logits).max()) * scale_terms(router, case)
        assert (np.abs(got_scales - arrays["expert_scale"]) <= bound).all(), router.kind


def scale_terms(router, case):
    """`[num_choices]`: the same of the gradient of expert_scale."""
    _, topk_idx, topk_weights, gradients = case
    sizes = np.zeros(router.config.num_choices)
    np.add.at(sizes, topk_idx, np.abs(gradients * topk_weights / router.rule.expert_scale[topk_idx]))
    return sizes


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_topk", [1, 3, 12])
@pytest.mark.parametrize("name", KINDS)
def test_sums_in_float32_are_as_far_off_as_their_roundings(name, num_topk, target):
    kind = KINDS[name] if num_topk < 12 else replace(KINDS[name], num_topk_groups=KINDS[name].num_groups)
    router = Router(kind, np.float32, num_topk)
    assert_equals_oracle(router, make_case(router, 40), target)


@pytest.mark.parametrize("target", TARGETS)
@given(st.data())
def test_any_kind_has_the_gradients_of_the_reference(target, data):
    num_topk, num_zero = data.draw(st.integers(1, 12)), data.draw(st.sampled_from([0, 4]))
    kind = data.draw(router_kinds(12 - num_zero, num_topk, ("logits", "score", "given"), num_zero))
    is_mixer = kind.score == "sparsemixer"  # whose roundings decide who is near
    real = np.float64 if is_mixer else data.draw(st.sampled_from([np.float32, np.float64]))
    router = Router(kind, real, num_topk - kind.num_always, num_zero, 12 - kind.num_always)
    assert_equals_oracle(router, make_case(router, seed=data.draw(st.integers(0, 2**32))), target)
