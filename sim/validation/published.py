"""Columns that published tables have beside the time, by the formulas of their own benchmarks.

MegaMoE's table (deepseek-ai/DeepGEMM pull request 316, formulas of its tests/test_mega_moe.py): products over the time;
bytes over the time without the reduction, which is taken to stream at 6.5 TB/s. Bytes are those of the elements alone:
scales are not counted, and weights only of experts that have rows. Per GPU, the mean of all ranks.

DeepEP's tables (deepseek-ai/DeepEP, docs/legacy.md): the "bottleneck bandwidth" of a dispatch or a combine.

Leaves out: shared experts, which MegaMoE's benchmark got later.
"""

from __future__ import annotations

import numpy as np

from reference.scalars import check_one_of

from ..drafting.hops import make_hops
from ..world.world import World

REDUCTION_BYTES_PER_S = 6.5e12
ELEMENT_BYTES = {"fp8xfp4": (0.5, 1), "fp8": (1, 1), "bfloat16": (2, 2)}  # of weights, and of tokens
RESULT_BYTES = 2
NVLINK_BYTES = 3  # per element of a row that goes there in one byte and back in two, own rows counted as well


def megamoe_columns(world: World, latency_us: float) -> dict[str, float]:
    """`compute_throughput` in TFLOPS, `hbm_bw` and `nvlink_bw` in GB/s, under their names in the table.

    Raises:
        ValueError: a precision that the benchmark does not have.
    """
    check_one_of("precision", world.precision.name, ELEMENT_BYTES)
    hidden, ffn = world.config.hidden, world.config.ffn
    weight, token = ELEMENT_BYTES[world.precision.name]
    rows = world.rows.sum() / world.num_ranks
    active = np.count_nonzero(world.routing.counts.sum(axis=0)) / world.num_ranks
    matrices = hidden * (world.up_columns + ffn)
    hbm = active * matrices * weight + rows * (hidden * token + 2 * ffn * token + hidden * RESULT_BYTES)
    reduced = world.routing.num_tokens * (1 + world.config.num_topk) * hidden * RESULT_BYTES
    overlapped = latency_us * 1e-6 - reduced / REDUCTION_BYTES_PER_S
    return {
        "compute_throughput": float(2 * rows * matrices / latency_us * 1e-6),
        "hbm_bw": float(hbm / overlapped * 1e-9),
        "nvlink_bw": float(rows * hidden * NVLINK_BYTES / overlapped * 1e-9),
    }


def bottleneck_gbps(world: World, stage: str, time_ns: int) -> float:
    """The "bottleneck bandwidth" of DeepEP's tables for a dispatch or combine that takes `time_ns`; mean over ranks.

    As tests/test_intranode.py and test_internode.py define it, with all bytes that stay within the rank or the node:
    on one node (tokens x ranks they go to) x bytes of a row, called NVLink; on more (tokens x nodes they go to) x bytes
    of a row, called RDMA. So it may exceed what the link carries: by 8/7 on 8 ranks, by 2 on 2 nodes.
    """
    hops = make_hops(world, world.routing.num_tokens, world.routing.num_tokens)
    rows = hops.copies if world.num_nodes == 1 else hops.visits
    size = world.precision.token_bytes if stage == "dispatch" else world.precision.result_bytes
    return float(rows.sum() / world.num_ranks * world.config.hidden * size / time_ns)
