"""What tests of the router's backward share: kinds, and a router and its backward on arrays of their own."""

import importlib
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from cases import assert_same_bits
from kinds import ROUTERS, V3

from flashmoe_numba.device import jit, lane, lanes
from flashmoe_numba.device.compilation import _interpretation, interpreted
from flashmoe_numba.device.fibers import Scheduler
from flashmoe_numba.heap.rules import make_kinds
from flashmoe_numba.kernel.router import route_token
from flashmoe_numba.kernel.router_gradient import route_token_back, scale_gradient
from reference import MoEConfig, RouterKind, Weights

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
TARGETS = ("interpreted", "compiled")


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
    """A router with its arrays, in the type of sums `real`.

    Args:
        num_topk: choices beside those of all tokens.
        chosen_from: choices that these are made from, the last `num_zero` of them zero-computation experts.
    """

    def __init__(self, kind, real=np.float64, num_topk=3, num_zero=0, chosen_from=12):
        num_experts, num_topk = chosen_from + kind.num_always - num_zero, num_topk + kind.num_always
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
