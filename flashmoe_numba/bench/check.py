"""Is what a layer computed right? Its routing is checked against exact logits, its results against the float64 oracle.

The oracle runs with the layer's own routing, because near a tie either expert is a right choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reference import MoEConfig, Routing, Weights, Workload, check_routing, max_rel_error, moe_layer, tolerance


@dataclass(frozen=True)
class Verdict:
    """`failures` has one sentence for each thing that is wrong; nothing is if it is empty.

    `illegal`: the routing is none, so there is nothing to compare with.
    """

    max_rel_error: float
    tolerance: float
    failures: list[str]
    illegal: bool = False


def check_layer(
    config: MoEConfig, weights: Weights, workload: Workload, routing: Sequence[Routing], y: Sequence[np.ndarray]
) -> Verdict:
    """Judge one call.

    Args:
        weights: all experts.
        workload: all ranks' tokens, and the routing if it came from outside.
        routing: as the layer tells it, one per rank.
        y: `[num_tokens_of_rank, hidden]` of each rank.
    """
    failures = _routing_failures(config, weights, workload, routing)
    idx, factors = [part.topk_idx for part in routing], [part.topk_weights for part in routing]
    try:
        exact = moe_layer(workload.x, weights, config, topk_idx=idx, topk_weights=factors)
    except ValueError as illegal:  # an expert twice, or one that there is not
        return Verdict(float("inf"), tolerance(config), [*failures, str(illegal)], illegal=True)
    error, limit = max_rel_error(y, exact), tolerance(config)
    if not error <= limit:
        failures.append(f"max_rel_error must be at most {limit:.2e}, got {error:.2e}")
    return Verdict(error, limit, failures)


def _routing_failures(config: MoEConfig, weights: Weights, workload: Workload, routing: Sequence[Routing]) -> list[str]:
    if workload.topk_idx is None or workload.topk_weights is None:
        found = [check_routing(part, x, weights, config) for part, x in zip(routing, workload.x, strict=True)]
    else:
        given = zip(routing, workload.topk_idx, workload.topk_weights, strict=True)
        found = [_difference(part, idx, factors) for part, idx, factors in given]
    return [f"routing of rank {rank}: {sentence}" for rank, sentence in enumerate(found) if sentence is not None]


def _difference(routing: Routing, topk_idx: np.ndarray, topk_weights: np.ndarray) -> str | None:
    same = np.array_equal(routing.topk_idx, topk_idx) and np.array_equal(routing.topk_weights, topk_weights, True)
    return None if same else "is not the one that was given"
