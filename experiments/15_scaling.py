"""Question: how large a machine can be simulated, in how much time and memory, and does FlashMoE scale on it?

Command:  python experiments/15_scaling.py [--gpus 8,64,256,1024] [--packing NAME] [--json FILE]
Expected: 256 GPUs, six million tasks, take seconds; 1,024 GPUs, 94 million, minutes and some 2 GB. Between nodes it is
          the NICs that count: from 64 GPUs on latency grows by less than a third, as long as a GPU has 256 row blocks.
          On 1,024 GPUs, with as many experts, a packet has 8 rows and there are four times as many row blocks: latency
          more than doubles. With tiles packed over sources it does not. That is checked.

One layer of DeepSeek-V3's sizes (hidden 7168, ffn 2048 gated, top-8, bfloat16), 1,024 tokens on each GPU, nodes of 8
H100, 256 experts and from 512 GPUs on as many as GPUs. Peak memory is that of the whole process so far; sizes are run
in ascending order, so it is that of the last. The engine is compiled before the clock starts.
"""

from __future__ import annotations

import resource
import sys
import time

from common import Row, parser_of, show, store
from sim_common import PRECISION, RATE, heading

from sim import MoEConfig, Scenario, make_knobs
from sim.engine import compiled
from sim.engine.graph import GraphBuilder
from sim.engine.kinds import GEMM0
from sim.policies import build

TOKENS, GPUS_PER_NODE = 1024, 8
PACKINGS = ("per_source", "per_expert", "arrived")
LAYER = dict(hidden=7168, ffn=2048, num_topk=8, gated=True, activation="silu", dtype=PRECISION)
COLUMNS = {"gpus": ",d", "experts": ",d", "blocks per GPU": ",.0f", "nodes of graph": ",d", "edges": ",d",
           "tasks": ",d", "events": ",d", "routing_s": ".1f", "build_s": ".1f", "run_s": ".1f", "mevents_per_s": ".2f",
           "peak_gb": ".1f", "latency_us simulated": ",.0f"}  # fmt: skip


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--gpus", default="8,64,256,1024", metavar="N[,N]", help="multiples of 8 [8,64,256,1024]")
    parser.add_argument("--packing", default="per_source", choices=PACKINGS, help="[per_source]")
    args = parser.parse_args()
    sizes = [8, 64] if args.smoke else sorted(map(int, args.gpus.split(",")))
    compiled.run(GraphBuilder().build())  # compiles
    rows = []
    for gpus in sizes:
        rows.append(measure(gpus, 128 if args.smoke else TOKENS, args.packing))
    heading(f"flashmoe, tiles {args.packing}, {RATE:.0%} of the tensor peak, on nodes of 8xH100")
    show(rows, COLUMNS)
    store(rows, args.json)
    return 0 if holds(rows) else 1


def measure(gpus: int, tokens: int, packing: str) -> Row:
    """Make a routing, build its graph and run it; seconds of each."""
    start = time.perf_counter()
    config = MoEConfig(num_ranks=gpus, num_tokens=tokens, num_experts=max(256, gpus), **LAYER)
    world = Scenario(
        config=config, hardware=f"{gpus // GPUS_PER_NODE}x{GPUS_PER_NODE}xH100", precision=PRECISION
    ).make()
    routed = time.perf_counter()
    graph = build("flashmoe", world, make_knobs("flashmoe", {"packing": packing, "rate": RATE}))
    built = time.perf_counter()
    timeline = compiled.run(graph, keep_runs=False)
    ran = time.perf_counter()
    return {
        "gpus": gpus, "experts": config.num_experts, "tokens": tokens, "packing": packing, "simulated": True,
        "blocks": int((graph.nodes["kind"] == GEMM0).sum()) / gpus,
        "nodes": graph.num_nodes, "edges": len(graph.succ), "tasks": graph.num_tasks, "events": timeline.num_events,
        "routing_s": routed - start, "build_s": built - routed, "run_s": ran - built,
        "mevents_per_s": timeline.num_events / (ran - built) / 1e6,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "latency_us": timeline.makespan_ns / 1000,
    }  # fmt: skip


def holds(rows: list[Row]) -> bool:
    """What the docstring expects, of 64 GPUs and more."""
    level = [row["latency_us"] for row in rows if row["gpus"] >= 64 and row["blocks"] < 300]
    steep = [row["latency_us"] for row in rows if row["blocks"] >= 300]
    return all(us < 4 / 3 * min(level) for us in level) and all(us > 2 * max(level, default=0) for us in steep)


if __name__ == "__main__":
    sys.exit(main())
