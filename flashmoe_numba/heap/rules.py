"""A layer's kinds of router and experts as the records that kernels read (kernel/rules.py)."""

from __future__ import annotations

import numpy as np

from reference import MoEConfig, Weights
from reference.arrays import Array
from reference.layer_kinds import CHOICES, GROUP_FILLS, GROUP_SCORES, SCORES

from ..kernel.rules import ResultNorm, RouterRule
from .protocols import Memory


def router_rule(config: MoEConfig, weights: Weights, memory: Memory, into: RouterRule | None = None) -> RouterRule:
    """Args: into: a rule of other weights, whose arrays are filled anew; None: take memory."""
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
        logit_bias=_array(weights.router_bias, config, memory, into and into.logit_bias),
        selection_bias=_array(weights.selection_bias, config, memory, into and into.selection_bias),
        expert_scale=_array(weights.expert_scale, config, memory, into and into.expert_scale),
    )


def result_norm(config: MoEConfig, weights: Weights, memory: Memory, into: ResultNorm | None = None) -> ResultNorm:
    """Args: into: as of `router_rule`."""
    number = config.accumulator.type
    scale = _array(weights.result_scale, config, memory, into and into.scale)
    return ResultNorm(number(config.expert_kind.norm_eps or 0), number(config.hidden), scale)


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


def _array(values: Array | None, config: MoEConfig, memory: Memory, into: Array | None) -> Array:
    array = np.array([] if values is None else values, config.accumulator, order="C")
    if into is None:
        return memory.array(array)
    memory.store(into, array)
    return into
