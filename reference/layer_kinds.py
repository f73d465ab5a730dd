"""What kind of router and of experts a layer has, as values: the words in which every other module asks for them.

A config has one of each. What a kind computes is in `routers` and `experts`; which kind a public model has, in
`families`. Softmax over the chosen logits is softmax over all of them, renormalised, and has no word of its own; no
more has a scale after the sum over experts, which is one of the weights. Leaves out: biases of experts, which weights
have or not, of any kind of expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .activations import ACTIVATIONS
from .formats import NumberFormat
from .scalars import check_name, check_whole, make_plain, number

SCORES = ("softmax", "sigmoid", "sqrt_softplus", "sparsemixer")
CHOICES = ("logits", "score", "given")
GROUP_SCORES = ("max", "top2_sum")
GROUP_FILLS = ("lowest", "zero")
BOUNDS = ("none", "clamp", "clamp_activated", "softcap")
ABOVE_ZERO = ("norm_order", "logit_scale", "logit_cap", "gate_limit", "up_limit", "slope")
OTHER_NUMBERS = ("norm_eps", "norm_min", "jitter", "scale", "up_offset")


@dataclass(frozen=True, kw_only=True)
class RouterKind:
    """How logits become experts and their weights.

    A logit is `z = cap(scale * (x @ router + router_bias))`; an expert's score is a function of its token's logits; the
    choice is made on logits or scores, plus the selection bias, in the best groups; the chosen scores, perhaps divided
    by their norm, times `scale`, are the weights. Names in brackets: public models that have it.

    Args:
        score: what weights are made of. softmax: of all logits. sigmoid, sqrt_softplus (deepseek_v4): of the expert's
            own logit. sparsemixer (phimoe): softmax over those experts not yet chosen whose logit z is near the best of
            them, m: `(m - z) / max(|z|, m) <= 2 * jitter`.
        choice: what the best are chosen by. logits: the order of scores, without the ties that rounding makes; with a
            selection bias another order than theirs (kolibri1). score: where a bias is added or groups are compared
            (deepseek_v3). given: experts come from outside, from a table of token ids (deepseek_v4's first layers).
        selection_bias: is `Weights.selection_bias` added for the choice? The weights are without it (deepseek_v3).
        num_groups: groups of neighbouring experts; must divide those that are chosen from (deepseek_v2).
        num_topk_groups: best groups, which a token chooses from.
        group_score: of a group, by the values that the choice is made on: their max (deepseek_v2), or the sum of their
            two best, top2_sum (deepseek_v3).
        group_fill: the value that experts of other groups get: lowest, which is below all (deepseek_v3), or zero, which
            biased scores may be below (axk2). Of softmax without a bias none is.
        num_always: the last so many experts are chosen by every token, after the others, and their scores are in the
            norm; no selection bias and no group is theirs (inkling's shared experts).
        renormalize: divide the chosen scores by their norm (mixtral).
        norm_order: p of that norm: 1, their sum, or another one (dbrx).
        norm_eps: added to the norm (deepseek_v3).
        norm_min: the least that is divided by (ernie4_5_moe).
        scale: of all weights (deepseek_v2).
        expert_scale: is the weight multiplied by `Weights.expert_scale` of its expert (gemma4)?
        weight_input: multiply the token by the weight before its expert, and not the result (llama4).
        logit_bias: is there a `Weights.router_bias` (gpt_oss)?
        logit_scale: of logits (muse_spark).
        logit_cap: logits become `logit_cap * tanh(z / logit_cap)` (laguna); None: they stay.
        jitter: of sparsemixer.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """

    score: str = "softmax"
    choice: str = "logits"
    selection_bias: bool = False
    num_groups: int = 1
    num_topk_groups: int = 1
    group_score: str = "max"
    group_fill: str = "lowest"
    num_always: int = 0
    renormalize: bool = False
    norm_order: float = 1.0
    norm_eps: float = 0.0
    norm_min: float = 0.0
    scale: float = 1.0
    expert_scale: bool = False
    weight_input: bool = False
    logit_bias: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None
    jitter: float = 0.0

    def __post_init__(self) -> None:
        make_plain(self)
        check_name("score", self.score, SCORES)
        check_name("choice", self.choice, CHOICES)
        check_name("group_score", self.group_score, GROUP_SCORES)
        check_name("group_fill", self.group_fill, GROUP_FILLS)
        for name in ("selection_bias", "renormalize", "expert_scale", "weight_input", "logit_bias"):
            _check_flag(name, getattr(self, name))
        check_whole("num_groups", self.num_groups, 1)
        check_whole("num_topk_groups", self.num_topk_groups, 1, self.num_groups)
        check_whole("num_always", self.num_always, 0)
        for name in ("norm_order", "logit_scale"):
            _check_number(name, getattr(self, name), above=True)
        for name in ("norm_eps", "norm_min", "jitter"):
            _check_number(name, getattr(self, name))
        _check_finite("scale", self.scale)
        if self.logit_cap is not None:
            _check_number("logit_cap", self.logit_cap, above=True)
        self._check_relations()

    def _check_relations(self) -> None:
        """What would be without an effect, or without a meaning, is refused."""
        if self.choice == "given" and (self.selection_bias or self.num_groups > 1 or self.num_always):
            raise ValueError("choice 'given' must have no selection_bias, groups or num_always: nothing is chosen")
        if self.score == "sparsemixer" and (self.choice != "logits" or self.selection_bias or self.num_groups > 1):
            raise ValueError("score 'sparsemixer' must have choice 'logits', no selection_bias and no groups")
        if self.score == "sparsemixer" and (self.renormalize or self.num_always):
            raise ValueError("score 'sparsemixer' must have renormalize=False and num_always=0")
        if self.score != "sparsemixer" and self.jitter:
            raise ValueError(f"jitter must be 0 for score {self.score!r}, got {self.jitter}")
        if not self.renormalize and (self.norm_order, self.norm_eps, self.norm_min) != (1, 0, 0):
            raise ValueError("norm_order, norm_eps and norm_min must stay 1, 0 and 0 if renormalize is False")

    def check_sizes(self, num_experts: int, num_topk: int) -> None:
        """Nothing, if a layer with that many experts, or choices, can have this kind; else a ValueError."""
        chosen_from, chosen = num_experts - self.num_always, num_topk - self.num_always
        if chosen < 0 or chosen_from < 0:
            raise ValueError(f"num_always must be in [0, num_topk={num_topk}], got {self.num_always}")
        if chosen_from % self.num_groups or self.num_groups > max(1, chosen_from):
            raise ValueError(f"num_groups must divide the {chosen_from} experts chosen from, got {self.num_groups}")
        if self.group_score == "top2_sum" and 1 < self.num_groups == chosen_from:
            rule = "num_groups must leave two experts to a group for group_score 'top2_sum'"
            raise ValueError(f"{rule}, got {self.num_groups} of {chosen_from} experts")
        if chosen > chosen_from // self.num_groups * self.num_topk_groups:
            rule = f"num_topk_groups must hold the {chosen} experts of a token"
            raise ValueError(f"{rule}, got {self.num_topk_groups} of {chosen_from // self.num_groups} experts")


@dataclass(frozen=True, kw_only=True)
class ExpertKind:
    """What an expert computes between its up and its down matrices, and after.

    Gated, with g and u the products with the gate and the up matrix: `a(g) * (u + up_offset)`, where a is
    `act(slope * g) / slope` and g and u are bound before; else `act(u)`. Names in brackets: public models that have it.

    Args:
        activation: one of `ACTIVATIONS`.
        gated: two up matrices instead of one.
        bound: of a gated expert. none. clamp: g to `min(g, gate_limit)`, u to `[-up_limit, up_limit]` (gpt_oss,
            deepseek_v4). clamp_activated: the same of u, but of a(g) and not of g (step3p7). softcap: u becomes
            `up_limit * tanh(u / up_limit)`, and a(g) is multiplied by `gate_limit * tanh(g / gate_limit) / g`, which
            caps the factor g of silu and lets its sigmoid as it is (inkling2).
        gate_limit, up_limit: of bound; None: no limit.
        slope: of the activation (gpt_oss: 1.702, which makes silu nearly gelu).
        up_offset: added to u (gpt_oss: 1).
        norm_eps: None, or of an RMS norm of each result: `v = Weights.result_scale * result` divided by
            `sqrt(mean(v^2) + norm_eps)` (muse_spark).

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """

    activation: str
    gated: bool
    bound: str = "none"
    gate_limit: float | None = None
    up_limit: float | None = None
    slope: float = 1.0
    up_offset: float = 0.0
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        check_name("activation", self.activation, ACTIVATIONS)
        check_name("bound", self.bound, BOUNDS)
        _check_flag("gated", self.gated)
        for name in ("gate_limit", "up_limit"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), above=True)
        _check_number("slope", self.slope, above=True)
        _check_finite("up_offset", self.up_offset)
        if self.norm_eps is not None:
            _check_number("norm_eps", self.norm_eps)
        if not self.gated and (self.bound != "none" or self.up_offset or self.slope != 1):
            raise ValueError("bound, up_offset and slope must stay 'none', 0 and 1 if gated is False")
        limits = self.gate_limit, self.up_limit
        if self.bound == "none" and limits != (None, None):
            raise ValueError(f"gate_limit and up_limit must stay None for bound 'none', got {limits}")
        if self.bound == "softcap" and None in limits:
            raise ValueError(f"gate_limit and up_limit must be numbers for bound 'softcap', got {limits}")
        if self.bound == "softcap" and self.activation != "silu":
            raise ValueError(f"bound 'softcap' must have activation 'silu', got {self.activation!r}")

    @property
    def plain(self) -> bool:
        """Is it nothing but an activation, gated or not?"""
        return self == ExpertKind(activation=self.activation, gated=self.gated)

    @property
    def activation_idx(self) -> int:
        """The activation as kernels know it: its index in `ACTIVATIONS`."""
        return ACTIVATIONS.index(self.activation)

    @property
    def num_ups(self) -> int:
        """Up matrices: columns of the first product for each column of the hidden rows."""
        return 1 + self.gated

    @property
    def num_matrices(self) -> int:
        return self.num_ups + 1

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the matrices in `Weights`, without `_proj`."""
        return ("up", "down", "gate") if self.gated else ("up", "down")


def check_range(kind: RouterKind | ExpertKind, sums: NumberFormat) -> None:
    """Nothing, if the kind's numbers stay what they are in the type of sums; else a ValueError that names one.

    Those that must be above 0 must be normal numbers there: of smaller ones the reciprocal is infinite, and some
    machines make them 0.
    """
    info = np.finfo(sums.dtype)
    for name in (*ABOVE_ZERO, *OTHER_NUMBERS):
        value, most = getattr(kind, name, None), float(info.max)
        least = float(info.tiny) if name in ABOVE_ZERO else -most
        if value is not None and not least <= value <= most:
            raise ValueError(f"{name} must be in [{least:.3g}, {most:.3g}] for sums in {sums.name}, got {value}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_finite(name: str, value: object) -> None:
    if not math.isfinite(number(name, value)):
        raise ValueError(f"{name} must be finite, got {value}")


def _check_number(name: str, value: object, above: bool = False) -> None:
    """Is it a finite number from 0 on, or `above` 0?"""
    _check_finite(name, value)
    given = number(name, value)
    if not (given > 0 if above else given >= 0):
        raise ValueError(f"{name} must be {'above 0' if above else 'at least 0'}, got {value}")
