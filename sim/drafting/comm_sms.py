"""How many multiprocessors DeepEP's kernels take: no policy, but what the policy `deepep` does unless it is told.

Source: deepseek-ai/DeepEP, deep_ep/buffers/elastic.py (V2), `get_theoretical_num_sms`.
Leaves out: groups of experts, and routings that are not balanced.
"""

from __future__ import annotations

from math import ceil, comb

from ..world.world import World

HEADROOM = 1.25


def analytic_comm_sms(world: World) -> int:
    """The multiprocessors that keep the slower kind of link busy.

    Per row that arrives at a rank: what a multiprocessor reads and writes, and what crosses the links; the ratio of
    their bandwidths, and a quarter more. With one rank, which has no links, the least it allows.
    """
    ranks, nodes, hardware = world.num_ranks, world.num_nodes, world.hardware
    near = min(ranks, hardware.gpus_per_node)
    per_token = _expected_groups(world, ranks)
    read, written, gbps = 1 / per_token, 1.0, hardware.nvlink_share_gbps
    nvlink, rdma = 1 - 1 / near, 0.0
    if nodes > 1:
        visits = _expected_groups(world, nodes) / per_token
        read, written, rdma = read + visits, 1 / per_token + visits / nodes + 1, visits * (1 - 1 / nodes)
    traffic = nvlink
    if rdma / hardware.nic_share_gbps > nvlink / gbps:
        traffic, gbps = rdma, hardware.nic_share_gbps
    speed = max(read / hardware.sm_read_gbps, written / hardware.sm_write_gbps)
    needed = ceil(HEADROOM * gbps * speed / traffic) if traffic else 0
    return min(max(4, needed + needed % 2), hardware.sms - 1)


def _expected_groups(world: World, groups: int) -> float:
    """Of so many equal groups of experts, those that hold an expert of a token."""
    experts, topk = world.config.num_experts, world.config.num_topk
    return groups * (1 - comb(experts - experts // groups, topk) / comb(experts, topk))
