"""What no schedule of a layer can be faster than, whatever it overlaps.

The longest of three, each on its busiest rank: the weights of the experts that have rows, once over the memory's
bandwidth; the products of the real rows, over the tensor peak; and the rows over the links, each token once to each
rank that it goes to and a result once from each.
A backward moves as many rows, multiplies twice as much, and writes gradients of weights, in their format at least; it
follows its forward.
Leaves out: latencies, activations in memory, and that a relay sends a token once to a node.
"""

from __future__ import annotations

import numpy as np

from ..world.world import FORWARDS, World
from .hops import token_copies


def roof_ns(world: World) -> dict[str, float]:
    """Nanoseconds by "weights", "products" and "links"."""
    hardware, precision, config = world.hardware, world.precision, world.config
    matrices = config.hidden * (world.up_columns + config.ffn)
    times = FORWARDS[world.passes]
    weights = times * world.active_experts.max(initial=0) * matrices * precision.weight_bytes
    operations = 2 * times * world.rows.max(initial=0) * matrices
    return {
        "weights": float(weights / (hardware.hbm_gbps * hardware.hbm_achieved)),
        "products": float(operations / (hardware.tflops[precision.mma_type] * 1e3)),
        "links": len(world.directions) * _links_ns(world),
    }


def _links_ns(world: World) -> float:
    """Of one node."""
    hardware, precision = world.hardware, world.precision
    source, _, target = token_copies(world.routing)
    away = source != target
    sent, received = (np.bincount(rank[away], minlength=world.num_ranks) for rank in (source, target))
    token, result = (world.config.hidden * size for size in (precision.token_bytes, precision.result_bytes))
    busiest = max((sent * token + received * result).max(), (received * token + sent * result).max())
    return float(busiest / hardware.nvlink_gbps) if world.num_nodes == 1 else 0.0
