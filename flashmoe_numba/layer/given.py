"""What a call gets from outside beside tokens: a routing, or what the router is to make one of."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reference import MoEConfig, Routing, external_routing
from reference.arrays import Array, check_array, check_floating


class Given(NamedTuple):
    """Of one rank; all None: its router has the tokens, and nothing else.

    Args:
        routing: a whole one, which the router has no part in.
        topk_idx: `[num_tokens, num_topk]`, -1 for no choice: for a router with choice "given".
        logits: `[num_tokens, num_choices]` in the accumulator's type, for the router.
    """

    routing: Routing | None = None
    topk_idx: Array | None = None
    logits: Array | None = None


def check_what_is_given(config: MoEConfig, topk_idx: Any, topk_weights: Any, logits: Any) -> None:
    """Nothing, if these arguments of a call, each perhaps None, can stand together.

    Raises:
        ValueError: naming the argument and the rule.
    """
    fixed = config.router_kind.choice == "given"
    if topk_weights is not None and topk_idx is None:
        raise ValueError("topk_idx must be given where topk_weights is")
    if topk_idx is not None and topk_weights is None and not fixed:
        raise ValueError("topk_weights must be given where topk_idx is, unless config's router has choice 'given'")
    if topk_idx is None and fixed:
        raise ValueError("topk_idx must be given, because config's router has choice 'given'")
    if logits is not None and topk_weights is not None:
        raise ValueError("logits must be None where topk_weights is given: nothing is left to be routed")


def check_given(config: MoEConfig, num_tokens: int, topk_idx: Any, topk_weights: Any, logits: Any) -> Given:
    """Those of one rank, checked and in the kernel's types; each may be None.

    Raises:
        TypeError, ValueError: naming the argument, its values and the rule.
    """
    if topk_weights is not None:
        return Given(routing=external_routing(topk_idx, topk_weights, config, num_tokens))
    idx = None
    if topk_idx is not None:
        none = np.zeros(np.shape(topk_idx))
        idx = external_routing(topk_idx, none, config, num_tokens).topk_idx
    if logits is None:
        return Given(topk_idx=idx)
    check_floating("logits", check_array("logits", logits, (num_tokens, config.num_choices)))
    with np.errstate(over="ignore"):  # as the kernel's own products overflow
        return Given(topk_idx=idx, logits=np.ascontiguousarray(logits, config.accumulator))
