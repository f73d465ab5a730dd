"""The least time that a layer takes on a machine, by what bounds it, whatever the schedule.

A rank computes its operations on real rows, streams once the weights of its experts that have rows, reads those rows
and writes their results, and its links carry what the policy put on them. Each over its full rate is a floor of the
latency; that of the busiest rank or link counts. Leaves out: rows between the two products, which a cache may hold;
that one floor's work may have to wait for another's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...engine.graph import Array
from ...simulation import Simulation
from ...world.world import FORWARDS, World
from ..measures import places


def roofline(simulation: Simulation) -> dict[str, Any]:
    """Rates of a GPU, work of the mean rank, and the floors in microseconds by their names; JSON."""
    world, graph = simulation.world, simulation.graph
    hardware = world.hardware
    peak, memory = hardware.tflops[world.precision.mma_type], hardware.hbm_gbps * hardware.hbm_achieved
    work = graph.nodes["count"] * graph.nodes["useful_flops"]
    operations = np.bincount(places(graph), work, minlength=world.num_ranks)
    nbytes = memory_bytes(world)
    floors = {"products": operations.max() / (peak * 1e6), "memory": nbytes.max() / (memory * 1e3)}
    carried = np.zeros(len(graph.links)) + simulation.timeline.link_bytes
    for link, of in zip(graph.links, carried.tolist(), strict=True):
        if of:
            floors[link.name] = max(floors.get(link.name, 0.0), of / (link.gbps * 1e3))
    return {
        "peak_tflops": peak,
        "memory_gbps": memory,
        "operations": float(operations.mean()),
        "memory_bytes": float(nbytes.mean()),
        "tflops": float(operations.mean()) / (simulation.latency_us * 1e6) if simulation.latency_us else 0.0,
        "floors_us": {name: float(floor) for name, floor in floors.items()},
    }


def memory_bytes(world: World) -> Array:
    """`[num_ranks]`: of each rank: weights of experts with rows and of the shared one, rows read, results written.

    A backward reads the weights and writes their gradients, in their format at least.
    """
    config, precision = world.config, world.precision
    columns = config.ffn * world.active_experts + config.shared_ffn
    weights = config.hidden * columns * config.expert_kind.num_matrices * precision.weight_bytes
    per_row = config.hidden * (precision.token_bytes + precision.result_bytes)
    result: Array = FORWARDS[world.passes] * weights + len(world.directions) * world.rows * per_row
    return result
