"""The roof of a layer on a machine (`drafting/roof.py`) beside what a schedule reaches of it, for a page."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...drafting.roof import operations, roof_ns, weight_bytes
from ...engine.graph import Array
from ...engine.kinds import DENSE, ROUTER_WEIGHTS
from ...simulation import Simulation
from ..measures import COMPUTES, places

PRODUCTS = tuple(kind for kind in COMPUTES if kind not in (DENSE, ROUTER_WEIGHTS))  # of the layer's experts


def roofline(simulation: Simulation) -> dict[str, Any]:
    """Rates of a GPU, work of the mean rank, and the floors in microseconds by their names; JSON."""
    world, latency_us = simulation.world, simulation.latency_us
    done, layer = multiplied(simulation).sum(), operations(world).sum()
    per_gpu = float(layer) / world.num_ranks
    hardware = world.hardware
    return {
        "peak_tflops": hardware.tflops[world.precision.mma_type],
        "memory_gbps": hardware.hbm_gbps * hardware.hbm_achieved,
        "operations": per_gpu,
        "memory_bytes": float(weight_bytes(world).mean()),
        "tflops": float(min(done, layer)) / world.num_ranks / (latency_us * 1e6) if latency_us else 0.0,
        "floors_us": {name: floor / 1000 for name, floor in roof_ns(world).items()},
    }


def multiplied(simulation: Simulation) -> Array:
    """`[num_ranks]`, operations of products of real rows that the schedule has on each rank."""
    nodes = simulation.graph.nodes
    work = np.where(np.isin(nodes["kind"], PRODUCTS), nodes["count"] * nodes["useful_flops"], 0)
    return np.bincount(places(simulation.graph), work, minlength=simulation.world.num_ranks)


def doubt(simulation: Simulation) -> str | None:
    """Why a schedule may be below the roof, where it may."""
    least = operations(simulation.world).max()
    most = multiplied(simulation).max()
    if most >= least * (1 - 1e-6):
        return None
    share = f"{100 * most / least:.0f} % of what the roof counts there"
    return f"the busiest rank multiplies {share}, so it may be below the roof"
