"""What no schedule of a layer can be faster than, whatever it overlaps: the one roof of tests, pages and studies.

The longest of three, each on its busiest rank: the weights of the experts that have rows and of the shared one, once
over the memory's bandwidth; the products of the real rows, over the tensor peak; and the rows over the links, each
token once to each rank that it goes to and a result once from each. Between nodes a token crosses once to each node, by
whichever NICs of its own one are free.
A backward moves as many rows, multiplies twice as much, and writes gradients of weights, in their format at least; it
follows its forward.

Leaves out: latencies, the gate, activations in memory, and rows that are forwarded within a node. A schedule whose
knobs leave a part of the layer out, or multiply rows elsewhere than where their experts live, may be below.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..engine.graph import Array
from ..world.world import FORWARDS, World
from .hops import token_copies


def roof_ns(world: World) -> dict[str, float]:
    """Nanoseconds by "weights", "products" and "links"."""
    return {
        "weights": float(memory_ns(world, weight_bytes(world).max())),
        "products": float(products_ns(world, operations(world).max())),
        "links": len(world.directions) * max(_within_ns(world), _between_ns(world)),
    }


def products_ns(world: World, operations: ArrayLike) -> Array:
    """Operations at a GPU's tensor peak."""
    return np.divide(operations, world.hardware.tflops[world.precision.mma_type] * 1e3)


def memory_ns(world: World, nbytes: ArrayLike) -> Array:
    """Bytes at the bandwidth that a GPU's memory achieves."""
    return np.divide(nbytes, world.hardware.hbm_gbps * world.hardware.hbm_achieved)


def operations(world: World) -> Array:
    """`[num_ranks]`, of the products of real rows, and of all tokens with the shared expert."""
    config = world.config
    columns = world.rows * float(config.ffn) + world.routing.num_tokens * config.shared_ffn
    result: Array = 2 * FORWARDS[world.passes] * columns * config.hidden * config.expert_kind.num_matrices
    return result


def weight_bytes(world: World) -> Array:
    """`[num_ranks]`, of experts that have rows and of the shared one, which are read; of a backward gradients, too."""
    config = world.config
    columns = config.ffn * world.active_experts + config.shared_ffn
    elements = columns * float(config.hidden) * config.expert_kind.num_matrices
    result: Array = FORWARDS[world.passes] * elements * world.precision.weight_bytes
    return result


# ---- links


def _within_ns(world: World) -> float:
    """Of rows that stay in their node, on the busiest rank's link."""
    source, _, target = token_copies(world.routing)
    per_node = world.hardware.gpus_per_node
    mine = (source != target) & (source // per_node == target // per_node)
    return float(_carried(world, source[mine], target[mine], world.num_ranks).max() / world.hardware.nvlink_gbps)


def _between_ns(world: World) -> float:
    """Of rows that leave their node, on all NICs of the busiest one."""
    hardware, nodes = world.hardware, world.num_nodes
    source, token, target = token_copies(world.routing)
    of_node = source // hardware.gpus_per_node
    visits = (source * world.routing.num_tokens + token) * nodes + target // hardware.gpus_per_node
    _, first = np.unique(visits, return_index=True)
    source, target = of_node[first], target[first] // hardware.gpus_per_node
    away = source != target
    ranks = np.minimum(hardware.gpus_per_node, world.num_ranks - np.arange(nodes) * hardware.gpus_per_node)
    nics = -(-ranks // hardware.gpus_per_nic)
    return float((_carried(world, source[away], target[away], nodes) / (nics * hardware.nic_gbps)).max())


def _carried(world: World, source: Array, target: Array, number: int) -> Array:
    """`[number]`: bytes that leave or reach each end, whichever are more, of tokens and of the results that return."""
    sent, received = (np.bincount(end, minlength=number) for end in (source, target))
    token, result = (world.config.hidden * size for size in (world.precision.token_bytes, world.precision.result_bytes))
    carried: Array = np.maximum(sent * token + received * result, received * token + sent * result)
    return carried
