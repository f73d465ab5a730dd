"""Why rows of published tables are not compared: what is known of them beyond that no rule matches.

One table, read from the top, as that of `rules`. Where none matches, the reason is that nothing stands for the system,
or that the quantity is not simulated.
"""

from __future__ import annotations

import re

from .tables import Row

OTHERS = r"MegaBlocks|ScatterMoE|MoMoE|DeepGEMM(-pt|\+\+)|Triton-distributed|torch\+nccl"

REASONS = (  # system, metric, why
    (r"(NCCL|NIXL)-EP low-latency.*", ".*", "host launches and a kernel of identity experts are in it, without a time"),
    ("DeepEP", "(dispatch|combine)_latency", "its GPU is not named"),
    (r"DeepEP V1 low-latency \(pure RDMA\)", ".*", "within a node it goes by RDMA, where the simulator has NVLink"),
    ("DeepEP V1 low-latency.*", "ll_(dispatch|combine)_bw", "it follows from the latency, which is compared"),
    (".*", "dense_.*", "dense products, no layer of experts"),
    (".*", "(symmetric|model)_.*", "sizes, no times: flashmoe plan tells them"),
    (".*", "phase_.*|gpu_ops_per_layer", "the simulation starts from it: knobs exchange_ns, tail_ns, num_ops"),
    (".*", "sm_utilization", "a profiler's count of active multiprocessors, with code around the layer"),
    (".*", "threads_per_block|best_comm_blocks_.*|optimal_nc_.*", "a setting, no time"),
    ("COMET", "(layer_|e2e_)?(speedup|latency_reduction|comm_|imbalance).*", "a summary over layers without names"),
    ("Megatron", "moe_.wd_throughput", "kernels on one GPU without collectives, of which bulk has the host's time"),
    (OTHERS, ".*", "no policy stands for the system"),
)


def known_reason(row: Row) -> str | None:
    """The first of `REASONS` that matches the row's system and metric."""
    for system, metric, why in REASONS:
        pairs = ((system, row.system), (metric, row.metric))
        if all(re.fullmatch(pattern, text, re.IGNORECASE) for pattern, text in pairs):
            return why
    return None
