"""Columns that published tables have beside the time, by the formulas of their own benchmarks.

MegaMoE's table (deepseek-ai/DeepGEMM pull request 316, formulas of its tests/test_mega_moe.py): products over the time;
bytes over the time without the reduction, which is taken to stream at 6.5 TB/s. Bytes are those of the elements alone:
scales are not counted, and weights only of experts that have rows. Per GPU, the mean of all ranks.

Leaves out: shared experts, which the benchmark got later.
"""

from __future__ import annotations

import numpy as np

from .world import World

REDUCTION_BYTES_PER_S = 6.5e12
ELEMENT_BYTES = {"fp8xfp4": (0.5, 1), "fp8": (1, 1), "bfloat16": (2, 2)}  # of weights, and of tokens
RESULT_BYTES = 2
NVLINK_BYTES = 3  # per element of a row that goes there in one byte and back in two, own rows counted as well


def megamoe_columns(world: World, latency_us: float) -> dict[str, float]:
    """`compute_throughput` in TFLOPS, `hbm_bw` and `nvlink_bw` in GB/s, under their names in the table.

    Raises:
        ValueError: a precision that the benchmark does not have.
    """
    if world.precision.name not in ELEMENT_BYTES:
        raise ValueError(f"precision must be one of {', '.join(ELEMENT_BYTES)}; got {world.precision.name!r}")
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
