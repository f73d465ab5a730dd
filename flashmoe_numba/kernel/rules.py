"""What kind of router and of experts a layer has (reference/layer_kinds.py), as records of numbers and arrays.

Numbers that are no integers have the type of sums, and so have the arrays, which are empty where a kind has none. Kinds
differ in these values alone: no kernel is compiled for one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reference.layer_kinds import CHOICES, GROUP_FILLS, GROUP_SCORES, SCORES

SOFTMAX, SQRT_SOFTPLUS, SPARSEMIXER = (SCORES.index(name) for name in ("softmax", "sqrt_softplus", "sparsemixer"))
BY_SCORE, GIVEN = CHOICES.index("score"), CHOICES.index("given")
TOP2_SUM = GROUP_SCORES.index("top2_sum")
FILL_LOWEST = GROUP_FILLS.index("lowest")


class RouterRule(NamedTuple):
    """`RouterKind`, and those of its weights that are not the matrix."""

    score: int  # indices into SCORES, CHOICES, GROUP_SCORES and GROUP_FILLS
    choice: int
    group_score: int
    group_fill: int
    num_groups: int
    num_topk_groups: int
    num_always: int
    renormalize: bool
    norm_order: int  # 1 or 2
    has_values: bool  # is the choice made on other numbers than the logits?
    one: Any  # 1: a literal would make float64 of a float32
    logit_scale: Any
    logit_cap: Any  # 0: none
    jitter: Any
    norm_eps: Any
    norm_min: Any
    scale: Any
    logit_bias: np.ndarray  # [num_choices], or empty
    selection_bias: np.ndarray  # [num_choices - num_always]
    expert_scale: np.ndarray  # [num_choices]


class ResultNorm(NamedTuple):
    """The RMS norm of experts' results; there is none where `scale` is empty."""

    eps: Any
    columns: Any  # hidden, as a number of that type
    scale: np.ndarray  # [hidden]
