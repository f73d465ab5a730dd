"""Shadow experts: a transform of a routing in which every rank computes the rows of a few busy experts itself.

The weights of a shadowed expert go to all ranks, and its rows stay where they are. Experts are taken by their rows, the
busiest first, as long as the predicted time falls: that of the busiest rank's products, of its rows out and in over the
link, and of the weights over the same link.

Source: FasterMoE (PPoPP 2022), section 4.2, and laekov/fastmoe's shadow policy, of which this is the forward part, with
the rows of ranks where they have one expert per rank. Leaves out: latencies, and what hides behind what.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..engine.graph import Array
from ..world.world import World


def choose_shadows(world: World, rate: float) -> Array:
    """`[num_shadows]`, the experts to be shadowed; `rate` is the share of the tensor peak that products reach."""
    counts = world.routing.counts
    busiest_first = np.argsort(-counts.sum(axis=0), kind="stable")
    best = predicted_ns(world, busiest_first[:0], rate)
    for number in range(1, len(busiest_first) + 1):
        now = predicted_ns(world, busiest_first[:number], rate)
        if now >= best:
            return busiest_first[: number - 1]
        best = now
    return busiest_first


def predicted_ns(world: World, shadows: Array, rate: float) -> float:
    """What a layer with these shadows is predicted to take."""
    config, hardware, precision = world.config, world.hardware, world.precision
    counts = world.routing.counts.copy()
    counts[:, shadows] = 0
    sent = world.routing.traffic(counts)
    rows = sent.sum(axis=0) + world.routing.counts[:, shadows].sum(axis=1)
    np.fill_diagonal(sent, 0)
    busiest_link = max(sent.sum(axis=0).max(), sent.sum(axis=1).max())
    matrix = config.hidden * (world.up_columns + config.ffn)
    products = rows.max() * 2 * matrix / (hardware.tflops[precision.mma_type] * 1e3 * rate)
    moved = busiest_link * config.hidden * (precision.token_bytes + precision.result_bytes)
    moved += len(shadows) * matrix * precision.weight_bytes
    return float(products + moved / link_gbps(world))


def link_gbps(world: World) -> float:
    """Of the slowest link between the ranks."""
    return world.hardware.nvlink_share_gbps if world.num_nodes == 1 else world.hardware.nic_share_gbps


def shadowed(world: World, shadows: Array) -> World:
    """The world with a copy of each shadow on every rank: copy `i` on rank `r` is expert `num_experts + i * ranks + r`.

    The owner's copy gets no rows: its own rows go where they went.
    """
    routing, ranks = world.routing, world.num_ranks
    copy_of = np.full(routing.num_experts, -1)
    copy_of[shadows] = routing.num_experts + np.arange(len(shadows)) * ranks
    rank = np.arange(ranks)[:, None, None]
    choices = routing.topk_idx
    away = (choices >= 0) & (copy_of[choices] >= 0) & (routing.owner[choices] != rank)
    topk_idx = np.where(away, copy_of[choices] + rank, choices).astype(np.int32)
    owner = np.concatenate([routing.owner, np.tile(np.arange(ranks, dtype=np.int32), len(shadows))])
    return replace(world, routing=replace(routing, num_experts=len(owner), topk_idx=topk_idx, owner=owner))
