"""The router's backward, interpreted and compiled, against differences of the router itself, and its limits."""

import importlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
from cases import assert_same_bits
from kinds import ROUTERS, V3

from flashmoe_numba.device import jit, lane, lanes
from flashmoe_numba.device.compilation import _interpretation, interpreted
from flashmoe_numba.device.fibers import Scheduler
from flashmoe_numba.heap.rules import make_kinds
from flashmoe_numba.kernel.router import route_token
from flashmoe_numba.kernel.router_gradient import route_token_back, scale_gradient
from reference import MoEConfig, RouterKind, Weights
from reference.routers import prepared_logits, scores_of

KERNEL = interpreted("flashmoe_numba.kernel")
with _interpretation():
    TWIN = importlib.import_module(f"{KERNEL.__name__}.router_gradient")

SOFTMAX = RouterKind(renormalize=True)
KINDS = ROUTERS | {
    "softmax": RouterKind(scale=-0.5),
    "softmax, norm_eps": replace(SOFTMAX, norm_eps=0.1),
    "softmax, 2-norm, norm_eps": replace(SOFTMAX, norm_order=2.0, norm_eps=0.1, expert_scale=True),
    "softmax, norm_min": replace(SOFTMAX, norm_min=0.6, norm_eps=0.01),
    "sigmoid, 2-norm, norm_min": replace(V3, norm_order=2.0, norm_min=1.4, num_groups=1, num_topk_groups=1),
    "sqrt_softplus": RouterKind(score="sqrt_softplus", expert_scale=True, scale=2.0),
    "everything": replace(V3, score="softmax", logit_bias=True, logit_scale=3.0, logit_cap=2.0, expert_scale=True),
    "sparsemixer": RouterKind(
        score="sparsemixer", jitter=0.5, logit_bias=True, logit_scale=0.5, logit_cap=1.5, scale=2.0, expert_scale=True
    ),
}  # fmt: skip
TARGETS = ("compiled", "interpreted")


class Sizes(NamedTuple):
    num_tokens: int
    num_choices: int
    num_topk: int


class Routed(NamedTuple):
    """Those of `Tokens` that a router has to do with."""

    logits: np.ndarray
    values: np.ndarray
    topk_idx: np.ndarray
    topk_weights: np.ndarray


class Back(NamedTuple):
    weight_gradients: np.ndarray
    kept_logits: np.ndarray
    logits_gradient: np.ndarray


@jit(entry=True)
def route_all(p, tokens, rule):
    for token in range(p.num_tokens):
        route_token(p, tokens, rule, token)


@jit(entry=True)
def route_all_back(p, tokens, rule, back, scales):
    for token in range(p.num_tokens):
        route_token_back(p, tokens, rule, back, token)
    scale_gradient(p, tokens, rule, back, scales)


def route_back_by_lanes(p, tokens, rule, back, scales):
    for token in range(lane(), p.num_tokens, lanes()):
        TWIN.route_token_back(p, tokens, rule, back, token)
    TWIN.scale_gradient(p, tokens, rule, back, scales)


class Router:
    """A router of 12 experts that are chosen from, with its arrays, in the type of sums `real`."""

    def __init__(self, kind, real=np.float64, num_topk=3, num_zero=0):
        num_experts, num_topk = 12 + kind.num_always - num_zero, num_topk + kind.num_always
        sizes = dict(num_tokens=7, hidden=4, ffn=4, num_experts=num_experts, num_topk=num_topk, num_zero=num_zero)
        config = MoEConfig(**sizes, num_ranks=1, router=kind, dtype=np.dtype(real).name)
        weights = Weights.random(config, seed=4)
        arrays = dict(
            logit_bias=weights.router_bias, selection_bias=weights.selection_bias, expert_scale=weights.expert_scale
        )
        arrays = {name: array.astype(real) for name, array in arrays.items() if array is not None}
        self.kind, self.config, self.weights, self.real = kind, config, weights, real
        self.rule = make_kinds(config).rule._replace(**arrays)

    def route(self, logits, topk_idx=None, rule=None):
        """topk_idx and topk_weights of each token."""
        p = Sizes(len(logits), self.config.num_choices, self.config.num_topk)
        values = np.zeros(p.num_tokens * (p.num_choices + self.kind.num_groups), self.real)
        idx = np.zeros(p.num_tokens * p.num_topk, np.int32) if topk_idx is None else topk_idx.ravel().astype(np.int32)
        tokens = Routed(logits.astype(self.real).ravel(), values, idx, np.zeros(idx.size, self.real))
        route_all(p, tokens, rule or self.rule)
        return tokens.topk_idx.reshape(-1, p.num_topk), tokens.topk_weights.reshape(-1, p.num_topk)

    def back(self, logits, topk_idx, topk_weights, gradients, target, before=None, scales=None, num_lanes=3):
        """Gradients of logits and of expert_scale, added to `before` and `scales`."""
        p = Sizes(len(logits), self.config.num_choices, self.config.num_topk)
        into = np.zeros(logits.size, self.real) if before is None else before.astype(self.real).ravel()
        scales = np.zeros(p.num_choices, self.real) if scales is None else scales.astype(self.real)
        spent = np.full(logits.size, np.nan, self.real)
        values, idx = np.zeros(0, self.real), topk_idx.ravel().astype(np.int32)
        tokens = Routed(spent, values, idx, topk_weights.astype(self.real).ravel())
        back = Back(gradients.astype(self.real).ravel(), logits.astype(self.real).ravel(), into)
        kept = [array.copy() for array in (back.kept_logits, back.weight_gradients, tokens.topk_weights)]
        if target == "compiled":
            route_all_back(p, tokens, self.rule, back, scales)
        else:
            scheduler = Scheduler()
            scheduler.add_block("test", route_back_by_lanes, (p, tokens, self.rule, back, scales), num_lanes)
            with np.errstate(all="ignore"):
                scheduler.run()
        for array, was in zip((back.kept_logits, back.weight_gradients, tokens.topk_weights), kept, strict=True):
            assert_same_bits(array, was, "what is read only")
        return into.reshape(logits.shape), scales


def make_case(router, num_tokens=7, seed=1):
    """(logits, topk_idx, topk_weights, gradients of weights), with choices left out where they are given."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((num_tokens, router.config.num_choices)).astype(np.float32)
    given = None
    if router.kind.choice == "given":
        given = np.argsort(rng.standard_normal(logits.shape), axis=1)[:, : router.config.num_topk]
        given[1, -1], given[2] = -1, -1
    topk_idx, topk_weights = router.route(logits, given)
    gradients = np.where(topk_idx >= 0, rng.standard_normal(topk_idx.shape), 0).astype(np.float32)
    gradients[3, 0] = 0  # as of a pair that was dropped
    return logits.astype(router.real), topk_idx, topk_weights, gradients


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


def in_float64(router):
    """The same router, with the numbers that it has, in float64."""
    exact = Router(router.kind, num_topk=router.config.num_topk - router.kind.num_always)
    arrays = {name: np.float64(value) for name, value in router.rule._asdict().items() if hasattr(value, "dtype")}
    exact.rule, exact.weights = router.rule._replace(**arrays), router.weights
    return exact


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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("num_topk", [1, 3, 12])
@pytest.mark.parametrize("name", KINDS)
def test_sums_in_float32_are_as_far_off_as_their_roundings(name, num_topk, target):
    kind = KINDS[name] if num_topk < 12 else replace(KINDS[name], num_topk_groups=KINDS[name].num_groups)
    router = Router(kind, np.float32, num_topk)
    logits, topk_idx, topk_weights, gradients = make_case(router, 40)
    got, got_scales = router.back(logits, topk_idx, topk_weights, gradients, target)
    exact = in_float64(router)
    expected, expected_scales = exact.back(logits, topk_idx, topk_weights, gradients, "compiled")
    unit = np.finfo(np.float32).eps / 2
    bound = unit * most_ulps(router, logits) * terms(exact, logits.astype(np.float64), topk_idx, gradients)
    off = np.abs(got - expected)
    assert (off <= bound).all(), f"off by {off.max()}, {(off / bound).max()} of the bound"
    if kind.expert_scale:
        sizes = np.abs(exact.back(logits, topk_idx, topk_weights, np.abs(gradients), "compiled")[1])
        assert (np.abs(got_scales - expected_scales) <= unit * (len(logits) + 2) * sizes).all()


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
@pytest.mark.parametrize("norm", [dict(), dict(renormalize=True, norm_order=2.0)])
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
    kind = RouterKind(score="sigmoid", renormalize=True, norm_order=order, norm_eps=0.1)
    logits = np.full((1, 12), -1e4)
    for kind, expected in ((kind, 0), (replace(kind, norm_eps=0.0), np.nan)):
        router = Router(kind)
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
