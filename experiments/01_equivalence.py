"""Question: does every way to run the layer compute the same layer?

Command:  python experiments/01_equivalence.py                   1, 2, 4 and 8 ranks; starts mpirun by itself
          mpirun -n 4 python experiments/01_equivalence.py       these ranks only
Expected: every row ok. Against the float64 oracle (with the kernel's routing) errors stay below the tolerance derived
          from dtype and lengths; and bit for bit, other numbers of processors and processes under mpirun equal threads.
          Some minutes; --smoke, seconds. Each dtype is compiled once (20 s), and found in the cache from then on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from common import Row, parser_of, show, store

from flashmoe_numba import FlashMoE
from flashmoe_numba.bench.check import check_layer
from flashmoe_numba.processes.launch import guard_this_rank, inside_mpirun, start
from flashmoe_numba.processes.together import LocalRanks, MpiRanks
from reference import MoEConfig, Routing, TiledLayer, Weights, Workload, make_workload

RANKS = (1, 2, 4, 8)
DEADLINE_S = 120.0
SEED = 3
COLUMNS = {"ranks": "d", "layer": "", "link": "", "error of the largest result": ".1e", "tolerance": ".1e", "ok": ""}


def main() -> int:
    args = parser_of(__doc__).parse_args()
    if inside_mpirun():
        guard_this_rank(DEADLINE_S)
        world = MpiRanks(DEADLINE_S)
        try:
            return world.agree(run(args, world, world.num_ranks))
        except BaseException as error:
            world.abandon(error)
    codes = [run(args, LocalRanks(), 1)]
    for ranks in RANKS[1:2] if args.smoke else RANKS[1:]:
        codes.append(start(ranks, [sys.executable, *sys.argv], DEADLINE_S))
    return max(codes)


def run(args: Any, world: LocalRanks | MpiRanks, ranks: int) -> int:
    """All links of all layers of that many ranks; rank 0 reports."""
    rows = [row for name, config, workload in layers(ranks, args.smoke) for row in links(name, config, workload, world)]
    if world.rank_idx == 0:
        show(rows, COLUMNS)
        store(rows, args.json)
    return 0 if all(row["ok"] for row in rows) else 1


def layers(ranks: int, smoke: bool) -> Iterator[tuple[str, MoEConfig, str]]:
    """(name, config, workload): odd sizes, so that every kind of tile is partly filled."""
    sizes = dict(num_ranks=ranks, num_tokens=13, hidden=20, ffn=27, num_experts=8, tile_m=8, tile_m_min=2, tile_n=12)
    kinds = product(("float32",), (("silu", True),), ((2, None, "text"), (3, 4, "hot"), (8, None, "uniform")))
    if not smoke:
        activations = (("silu", True), ("gelu", False), ("relu", True), ("identity", False))
        routings = ((1, None, "zipf:1.2"), (2, None, "text"), (3, 4, "hot"), (8, None, "uniform"))
        kinds = product(("float32", "float64", "bfloat16", "float16"), activations, routings)
    for dtype, (activation, gated), (topk, capacity, workload) in kinds:
        layer = dict(num_topk=topk, capacity=capacity, gated=gated, activation=activation, dtype=dtype)
        name = f"{dtype} {activation}{' gated' if gated else ''} top-{topk} {workload}"
        yield name, MoEConfig(**sizes, **layer, token_block=5), workload


def links(name: str, config: MoEConfig, workload_name: str, world: LocalRanks | MpiRanks) -> list[Row]:
    """Rows of one layer on rank 0; the others take part in the link that needs them."""
    tokens = [13 - 2 * (rank % 7) for rank in range(config.num_ranks)]  # 13, 11, ... 1
    workload = make_workload(workload_name, config, tokens, SEED)
    weights = Weights.random(config, SEED, bias=True)
    y_mpi = None if world.comm is None else across_processes(config, weights, workload, world)
    if world.rank_idx != 0:
        return []
    y, routing = kernel(config, weights, workload)
    rows = [against_oracle("threads", config, weights, workload, routing, y)]
    fibers, fiber_routing = kernel(config, weights, workload, backend="fibers", seed=SEED)
    rows.append(against_oracle("fibers", config, weights, workload, fiber_routing, fibers))
    tiled = TiledLayer(workload.x, weights, config, **as_arguments(routing))
    y_tiles = tiled.run(np.random.default_rng(SEED))
    rows.append(against_oracle("tiles in random order", config, weights, workload, routing, y_tiles))
    rows.append(bitwise("3 processors = 1", y, kernel(config, weights, workload, num_processors=3)[0]))
    if y_mpi is not None:
        rows.append(bitwise("processes = threads", y, y_mpi))
    return [{"ranks": config.num_ranks, "layer": name, **row} for row in rows]


def kernel(
    config: MoEConfig, weights: Weights, workload: Workload, **how: Any
) -> tuple[list[np.ndarray], list[Routing]]:
    """The layer in this process: results and routing of each rank."""
    with FlashMoE(config, weights, **({"num_processors": 1, "deadline_s": DEADLINE_S} | how)) as layer:
        return layer(workload.x, topk_idx=workload.topk_idx, topk_weights=workload.topk_weights), layer.routing


def across_processes(
    config: MoEConfig, weights: Weights, workload: Workload, world: MpiRanks
) -> list[np.ndarray] | None:
    """Results of each rank, a process each; None except on rank 0."""
    rank = world.rank_idx
    external = {} if workload.topk_idx is None else as_arguments([workload_routing(workload, rank)])
    own = weights.shard(rank, config.num_ranks)
    with FlashMoE(config, own, comm=world.comm, num_processors=1, deadline_s=DEADLINE_S) as layer:
        y = layer(workload.x[rank], **{name: parts[0] for name, parts in external.items()})
    return world.gather(y)


def workload_routing(workload: Workload, rank: int) -> Routing:
    assert workload.topk_idx is not None
    assert workload.topk_weights is not None
    return Routing(workload.topk_idx[rank], workload.topk_weights[rank])


def as_arguments(routing: Sequence[Routing]) -> dict[str, list[np.ndarray]]:
    return {name: [getattr(part, name) for part in routing] for name in ("topk_idx", "topk_weights")}


def against_oracle(
    link: str,
    config: MoEConfig,
    weights: Weights,
    workload: Workload,
    routing: Sequence[Routing],
    y: Sequence[np.ndarray],
) -> Row:
    verdict = check_layer(config, weights, workload, routing, y)
    row = {"error": verdict.max_rel_error, "tolerance": verdict.tolerance, "ok": not verdict.failures}
    return {"link": f"{link} = oracle", **row, "failures": verdict.failures}


def bitwise(link: str, y: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Row:
    different = sum(int((a.view(np.uint8) != b.view(np.uint8)).sum()) for a, b in zip(y, other, strict=True))
    failures = [f"{different} bytes differ"] if different else []
    return {"link": link, "error": float(different), "tolerance": 0.0, "ok": not different, "failures": failures}


if __name__ == "__main__":
    sys.exit(main())
