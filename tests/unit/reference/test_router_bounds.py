"""Bounds of a router's gradients pass float32 arithmetic, and fail it with a small fault."""

import numpy as np
import pytest
from test_gradient_bounds import F32, largest, product

from reference import MoEConfig, RouterKind, Weights, route, router_tolerance
from reference.router_gradients import router_backward
from reference.routers import exact_logits

KINDS = {
    "softmax": RouterKind(),
    "renormalised": RouterKind(renormalize=True, logit_bias=True),
    "norm and a little": RouterKind(renormalize=True, norm_eps=1e-20, logit_scale=0.5),
    "sigmoid": RouterKind(
        score="sigmoid", renormalize=True, norm_eps=0.1, scale=2.5, expert_scale=True, logit_scale=1.5, logit_bias=True
    ),
}


def float32_gradients(x, idx, d_weights, w, kind, fault):
    """(gradient of logits, of expert_scale by pair), by float32 formulas written down once more."""
    rows, dw = np.arange(len(x))[:, None], d_weights.astype(F32)
    logits = product(x, w.router.T)
    z = (logits + (w.router_bias.astype(F32) if kind.logit_bias else F32(0))) * F32(kind.logit_scale)
    powers = np.exp(z - z.max(axis=1, keepdims=True))
    if fault == "exp in float16":
        powers = powers.astype(np.float16).astype(F32)
    dz, d_scales = np.zeros_like(z), np.zeros(idx.shape)
    if kind.score == "sigmoid":
        f = 1 / (1 + np.exp(-z[rows, idx]))
        norm, scale = f.sum(axis=1, keepdims=True) + F32(kind.norm_eps), w.expert_scale.astype(F32)[idx]
        d_scales, g = dw * F32(kind.scale) * f / norm, dw * F32(kind.scale) * scale
        rest = 0 if fault == "no norm" else (g * f).sum(axis=1, keepdims=True) / norm
        dz[rows, idx] = (g - rest) / norm * f * (1 - f)
    elif kind.renormalize and not kind.norm_eps:
        p = powers[rows, idx] / powers[rows, idx].sum(axis=1, keepdims=True)
        dz[rows, idx] = p * (dw - (0 if fault == "no norm" else (p * dw).sum(axis=1, keepdims=True)))
    else:
        p, ds = powers / powers.sum(axis=1, keepdims=True), np.zeros_like(z)
        ds[rows, idx] = dw
        if kind.renormalize:
            norm = p[rows, idx].sum(axis=1, keepdims=True)
            rest = 0 if fault == "no norm" else (p * ds).sum(axis=1, keepdims=True) / norm
            ds[rows, idx] = (dw - rest) / norm
        dz = p * (ds - (0 if fault == "no norm" else (p * ds).sum(axis=1, keepdims=True)))
    return dz * F32(kind.logit_scale), d_scales


def excess(name, fault="", seed=0, dtype="bfloat16", size=1.0, num_tokens=37, num_topk=4):
    kind = KINDS[name]
    sizes = dict(num_ranks=1, num_tokens=num_tokens, hidden=53, ffn=3, num_experts=9, num_topk=num_topk)
    config = MoEConfig(**sizes, router=kind, dtype=dtype)
    w, rng = Weights.random(config, seed=seed), np.random.default_rng(seed)
    x = (size * rng.standard_normal((num_tokens, 53))).astype(config.numpy_dtype)
    d_weights, idx = rng.standard_normal((num_tokens, num_topk)), route(x, w, config).topk_idx
    exact, arrays = router_backward(exact_logits(x, w), idx, d_weights, w, config)
    bound = router_tolerance(x, idx, d_weights, w, config)
    d_logits, d_scales = float32_gradients(x, idx, d_weights, w, kind, fault)
    scale = np.zeros(9)
    np.add.at(scale, idx, d_scales)
    router, matrix = exact.T @ x.astype(np.float64), w.router.astype(np.float64)
    return {
        "logits": largest(d_logits, exact, bound.logits),
        "x": largest(product(d_logits, w.router), exact @ matrix, bound.x),
        "router": largest(product(d_logits.T, x), router, bound.arrays["router"]),
        "router_bias": largest(d_logits.sum(axis=0), arrays["router_bias"], bound.arrays["router_bias"]),
        "expert_scale": largest(scale, arrays["expert_scale"], bound.arrays["expert_scale"]),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_float32_is_inside_and_not_far(name, dtype):
    for seed in range(3):
        found = excess(name, seed=seed, dtype=dtype)
        assert max(found.values()) < 0.6, found
        assert min(value for n, value in found.items() if n != "expert_scale") > 0.01, found
        assert name != "sigmoid" or found["expert_scale"] > 0.005


@pytest.mark.parametrize("name", KINDS)
def test_routers_that_are_sure_are_inside(name):
    """Logits of some tens: probabilities of 1 less some 1e-20, which float32 has not."""
    for seed in range(3):
        for num_tokens in (1, 37):
            assert max(excess(name, size=20.0, seed=seed, num_tokens=num_tokens).values()) < 0.7


@pytest.mark.parametrize("name", ["renormalised", "norm and a little"])
def test_the_only_choice_may_be_off_by_what_its_norm_takes_away(name):
    """The gradient is next to nothing, and all of float32's is an error."""
    for seed in range(3):
        assert max(excess(name, seed=seed, num_topk=1).values()) < 0.7


@pytest.mark.parametrize("name", KINDS)
def test_a_missing_norm_is_outside(name):
    found = excess(name, "no norm")
    assert min(found[n] for n in ("logits", "x", "router", "router_bias")) > 1, found


@pytest.mark.parametrize("name", ["softmax", "renormalised"])
def test_a_wrong_rounding_is_outside(name):
    found = excess(name, "exp in float16")
    assert min(found[n] for n in ("logits", "x", "router", "router_bias")) > 1, found
