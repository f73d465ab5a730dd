"""Question: how many tasks per second do the engines simulate, beside SimPy on the same graph?

Command:  python experiments/10_engine_speed.py [--repeats N] [--json FILE]
Expected: the compiled engine simulates millions of tasks per second, at least 20 times as many as SimPy and 5 times as
          many as the same engine in plain Python; and all three agree on when everything is done.

Graphs: `queue` is one task per node, through 8 servers of 264 slots, each with a time of its own. `bulk` and `flashmoe`
are those schedules on 8 x H100 with 16,384 tokens each and 128 experts, without their transfers, which SimPy has no
counterpart for, and first come first served: SimPy's queue with priorities sorts itself at every request, which takes
it minutes. Equal tasks that start together are one event: bulk's come in whole waves. `flashmoe+links` has transfers.
All engines get the same graph, one after the other, round and round; medians are shown. Building the graph is not part
of the time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import simpy
from common import Row, parser_of, show, store

from reference import MoEConfig
from sim import Scenario
from sim.engine import compiled, plain
from sim.engine.graph import NONE, GraphBuilder, TaskGraph
from sim.engine.kinds import GEMM0, GEMM1
from sim.policies import build, make_knobs

COLUMNS = {"graph": "", "engine": "", "tasks": ",d", "seconds": ".3f", "mtasks_per_s": ".3f", "times_simpy": ".1f",
           "makespan_us": ",.1f"}  # fmt: skip


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all engines [5]")
    args = parser.parse_args()
    scale = 0.02 if args.smoke else 1
    rows = []
    graphs = {name: policy_graph(name, tokens=int(16384 * scale)) for name in ("bulk", "flashmoe")}
    rows += compare("queue", queue_graph(int(100_000 * scale)), args.repeats)
    for name, graph in graphs.items():
        rows += compare(name, without_links(graph), args.repeats)
    rows += compare("flashmoe+links", graphs["flashmoe"], args.repeats, with_simpy=False)
    show(rows, COLUMNS)
    store(rows, args.json)
    return 0 if agree(rows) else 1


def queue_graph(tasks: int) -> TaskGraph:
    """Pairs of tasks: each first product is followed by its second; durations are drawn from 5 to 6 us."""
    builder, random = GraphBuilder(), np.random.default_rng(0)
    for rank in range(8):
        builder.add_server("slots", rank, 264)
    rank = np.arange(tasks // 2) % 8
    first, second = (
        builder.add(kind, rank, server=rank, duration_ns=random.integers(5000, 6000, len(rank)))
        for kind in (GEMM0, GEMM1)
    )
    builder.edge(first, second)
    return builder.build()


def without_links(graph: TaskGraph) -> TaskGraph:
    plain = {name: np.zeros_like(graph.nodes[name]) for name in ("nbytes", "priority")}
    return replace(graph, nodes=graph.nodes | plain)


def policy_graph(policy: str, tokens: int) -> TaskGraph:
    config = MoEConfig(num_ranks=8, num_tokens=tokens, hidden=2048, ffn=2048, num_experts=128, num_topk=2)
    knobs = make_knobs(policy, {"packing": "per_source"} if policy == "flashmoe" else {})
    return build(policy, Scenario(config=config, hardware="8xH100", precision="bfloat16").make(), knobs)


def compare(name: str, graph: TaskGraph, repeats: int, with_simpy: bool = True) -> list[Row]:
    """A row per engine."""
    engines: dict[str, Callable[[TaskGraph], float]] = {
        "compiled": lambda graph: compiled.run(graph).makespan_ns,
        "pure": lambda graph: plain.run(graph).makespan_ns,
    }
    if with_simpy:
        engines["simpy"] = run_simpy
    compiled.run(graph)  # compiles
    times: dict[str, list[float]] = {key: [] for key in engines}
    makespan = {}
    for _ in range(repeats):
        for key, run in engines.items():
            start = time.perf_counter()
            makespan[key] = run(graph)
            times[key].append(time.perf_counter() - start)
    median = {key: float(np.median(values)) for key, values in times.items()}
    return [
        {
            "graph": name,
            "engine": key,
            "tasks": graph.num_tasks,
            "seconds": seconds,
            "mtasks_per_s": graph.num_tasks / seconds / 1e6,
            "times_simpy": median.get("simpy", float("nan")) / seconds,
            "makespan_us": makespan[key] / 1000,
        }
        for key, seconds in median.items()
    ]


def run_simpy(graph: TaskGraph) -> float:
    """The graph's makespan by SimPy, each task a process that takes a slot for its time; links are left out."""
    world = simpy.Environment()
    slots = [simpy.Resource(world, server.slots) for server in graph.servers]
    nodes = {name: values.tolist() for name, values in graph.nodes.items()}
    waiting = graph.num_preds.tolist()
    undone = list(nodes["count"])

    def task(node: int):  # type: ignore[no-untyped-def]
        if nodes["server"][node] == NONE:
            yield world.timeout(nodes["duration_ns"][node])
        else:
            with slots[nodes["server"][node]].request() as turn:
                yield turn
                yield world.timeout(nodes["duration_ns"][node])
        if nodes["latency_ns"][node]:
            yield world.timeout(nodes["latency_ns"][node])
        undone[node] -= 1
        if not undone[node]:
            for after in graph.successors(node).tolist():
                waiting[after] -= 1
                if not waiting[after]:
                    ready(after)

    def ready(node: int) -> None:
        for _ in range(nodes["count"][node]):
            world.process(task(node))

    for node in range(graph.num_nodes):
        if graph.num_preds[node] == 0:
            ready(node)
    world.run()
    return float(world.now)


def agree(rows: list[Row]) -> bool:
    """The two engines to the nanosecond; SimPy, which breaks ties in another order, within a thousandth."""
    made: dict[str, dict[str, float]] = {}
    for row in rows:
        made.setdefault(row["graph"], {})[row["engine"]] = row["makespan_us"]
    return all(
        times["compiled"] == times["pure"] and abs(times.get("simpy", times["pure"]) / times["pure"] - 1) < 1e-3
        for times in made.values()
    )


if __name__ == "__main__":
    sys.exit(main())
