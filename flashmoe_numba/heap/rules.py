"""A layer's kinds of router and experts as the records that kernels read (kernel/rules.py)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reference import MoEConfig, Weights
from reference.arrays import Array
from reference.layer_kinds import CHOICES, GROUP_FILLS, GROUP_SCORES, SCORES

from ..kernel.rules import ResultNorm, RouterRule
from ..kernel.state import Experts
from ..tile_gemm import Form, linear_form, make_form
from .protocols import Memory


class Kinds(NamedTuple):
    """The fields of `Experts` that say what kinds a layer has."""

    rule: RouterRule
    form: Form
    shared_form: Form
    linear: Form
    norm: ResultNorm


def make_kinds(config: MoEConfig) -> Kinds:
    """Of any weights: arrays that these bring are empty."""
    number, none = config.accumulator.type, np.array([], config.accumulator)
    return Kinds(
        rule=_router_rule(config, none),
        form=make_form(config.expert_kind, config.accumulator),
        shared_form=make_form(config.shared_kind, config.accumulator),
        linear=linear_form(config.accumulator),
        norm=ResultNorm(number(config.expert_kind.norm_eps or 0), number(config.hidden), none),
    )


def _router_rule(config: MoEConfig, none: Array) -> RouterRule:
    kind, number = config.router_kind, config.accumulator.type
    return RouterRule(
        score=SCORES.index(kind.score),
        choice=CHOICES.index(kind.choice),
        group_score=GROUP_SCORES.index(kind.group_score),
        group_fill=GROUP_FILLS.index(kind.group_fill),
        num_groups=kind.num_groups,
        num_topk_groups=kind.num_topk_groups,
        num_always=kind.num_always,
        renormalize=kind.renormalize,
        norm_order=int(kind.norm_order),
        has_values=has_values(config),
        one=number(1),
        logit_scale=number(kind.logit_scale),
        logit_cap=number(kind.logit_cap or 0),
        jitter=number(kind.jitter),
        norm_eps=number(kind.norm_eps),
        norm_min=number(kind.norm_min),
        scale=number(kind.scale),
        logit_bias=none,
        selection_bias=none,
        expert_scale=none,
    )


def fill_kinds(kinds: Kinds, weights: Weights, memory: Memory, into: Experts | None = None) -> Kinds:
    """With the arrays of these weights.

    Args:
        into: what has those of other weights, to be filled anew; None: take memory.
    """
    dtype, rule = kinds.norm.scale.dtype, into and into.rule
    filled = kinds.rule._replace(
        logit_bias=_array(weights.router_bias, dtype, memory, rule and rule.logit_bias),
        selection_bias=_array(weights.selection_bias, dtype, memory, rule and rule.selection_bias),
        expert_scale=_array(weights.expert_scale, dtype, memory, rule and rule.expert_scale),
    )
    scale = _array(weights.result_scale, dtype, memory, into and into.norm.scale)
    return kinds._replace(rule=filled, norm=kinds.norm._replace(scale=scale))


def num_values(config: MoEConfig) -> int:
    """Elements of `Tokens.values`."""
    return config.num_tokens * (config.num_choices + config.router_kind.num_groups) if has_values(config) else 0


def has_values(config: MoEConfig) -> bool:
    """Is the choice of experts made on other numbers than their logits?"""
    kind = config.router_kind
    return kind.choice == "score" or kind.selection_bias or kind.num_groups > 1


def num_factors(config: MoEConfig) -> int:
    """Elements of `Tokens.factors`: results are added up with other factors than their weights, or with these."""
    has_own = config.router_kind.weight_input or config.expert_kind.norm_eps is not None
    return config.num_tokens * config.num_topk if has_own else 0


def _array(values: Array | None, dtype: np.dtype[Any], memory: Memory, into: Array | None) -> Array:
    array = np.array([] if values is None else values, dtype, order="C")
    if into is None:
        return memory.array(array)
    memory.store(into, array)
    return into
