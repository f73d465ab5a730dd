"""Question: how long does a signal take from one rank to another, and how fast do dispatch and combine move rows?

Command:  python experiments/21_gpu_signals.py --json experiments/results/signals.jsonl
          [--shapes olmoe] [--tokens 4096] [--virtual-ranks 8] [--repeats 20] [--dtype float16]
Expected: between virtual ranks a few microseconds; the clock (globaltimer) may step by a microsecond, see `clock_us`.
          Between processes that share a GPU without MPS: as long as a turn of the other process, a millisecond or so.
          All dispatches together move rows at a good part of the bandwidth that `20_gpu_roof.py` measures, one block
          alone at a few tens of GB/s.

From the kernel's own trace. A signal's latency is the time from the end of the sender's DISPATCH to the start of the
receiver's RECEIVE of that packet: the release, the poll that sees it, and what the poller did before. `block_gb_per_s`
is the median over the tasks of bytes written / time of the task, `all_gb_per_s` all bytes / (last end - first start).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from common import Row, show, store
from gpu_common import (
    facts,
    gpu_layer,
    gpu_parser,
    integers,
    leave_without_gpu,
    random_x,
    shares,
    study_configs,
    to_gpu,
)

from flashmoe_numba.errors import UsageError
from flashmoe_numba.processes.launch import guard_this_rank, inside_mpirun, start
from flashmoe_numba.processes.together import MpiRanks
from flashmoe_numba.seeing.trace import decode
from reference import COMBINE, DISPATCH, MoEConfig, Weights
from reference.task_kinds import RECEIVE
from reference.traces import Slice

DEADLINE_S = 60.0
PROCESSES = 2
COLUMNS = {
    "shape": "",
    "between": "",
    "ranks": "d",
    "tokens": "d",
    "signal_us": ".1f",
    "least_us": ".1f",
    "most_us": ".1f",
    "clock_us": ".3f",
    "dispatch_block_gb_per_s": ".1f",
    "dispatch_all_gb_per_s": ".0f",
    "combine_block_gb_per_s": ".1f",
    "combine_all_gb_per_s": ".0f",
    "ok": "",
}


def main() -> int:
    parser = gpu_parser(__doc__)
    parser.set_defaults(shapes="olmoe")
    parser.add_argument("--tokens", default="4096", help="of all ranks together [4096]")
    parser.add_argument("--virtual-ranks", type=int, default=8, help="[8]")
    args = parser.parse_args()
    leave_without_gpu(args)
    if args.smoke:
        args.tokens, args.virtual_ranks, args.repeats = "64", 2, 2
    if inside_mpirun():
        guard_this_rank(DEADLINE_S)
        world = MpiRanks(DEADLINE_S)
        try:
            return world.agree(between_processes(args, world.comm))
        except BaseException as error:
            world.abandon(error)
    rows = virtual(args)
    show(rows, COLUMNS)
    store(rows, args.json)
    try:
        code = start(PROCESSES, [sys.executable, *sys.argv], DEADLINE_S)
    except UsageError as error:
        print(f"between processes: left out: {error}")
        code = 0
    return code if all(row["ok"] for row in rows) else 1


def virtual(args: argparse.Namespace) -> list[Row]:
    """Ranks of one launch."""
    rows = []
    for tokens in integers(args.tokens):
        for name, config in study_configs(args, tokens, args.virtual_ranks).items():
            x = to_gpu(random_x(config))
            with gpu_layer(config, Weights.random(config), args, trace=True) as layer:
                calls = []
                for _ in range(args.repeats + 1):
                    layer(shares(x, config.num_ranks, tokens))
                    layer.synchronize()
                    calls.append(decode(layer.traces))
            rows.append(
                {"shape": name, "between": "virtual ranks", **summary(calls[1:], config, tokens), **facts(args)}
            )
    return rows


def between_processes(args: argparse.Namespace, comm: Any) -> int:
    """This process is one rank of several on GPU 0; rank 0 reports."""
    rows: list[Row] = []
    for tokens in integers(args.tokens):
        for name, config in study_configs(args, tokens, comm.size).items():
            weights = Weights.random(config).shard(comm.rank, comm.size)
            x = shares(to_gpu(random_x(config)), comm.size, tokens)[comm.rank]
            with gpu_layer(config, weights, args, comm=comm, device=0, trace=True, deadline_s=DEADLINE_S) as layer:
                calls = []
                for _ in range(args.repeats + 1):
                    comm.Barrier()
                    layer(x)
                    layer.synchronize()
                    parts = comm.gather(decode(layer.traces))
                    calls.append([record for part in parts or [] for record in part])
            if comm.rank == 0:
                row = {"shape": name, "between": "processes", **summary(calls[1:], config, tokens), **facts(args)}
                rows.append(row)
    if comm.rank == 0:
        show(rows, COLUMNS)
        store(rows, args.json)
    return 0 if all(row["ok"] for row in rows) else 1


def summary(calls: list[list[Slice]], config: MoEConfig, tokens: int) -> Row:
    """Of several calls."""
    latencies = [latency for records in calls for latency in signal_latencies(records)]
    clock = [step for records in calls for step in clock_steps(records)]
    dispatch = [packet_rates(records, config) for records in calls]
    combine = [combine_rates(records, config) for records in calls]
    return {
        "ranks": config.num_ranks,
        "tokens": tokens,
        "signals": len(latencies),
        "signal_us": float(np.median(latencies)) / 1e3,
        "least_us": min(latencies) / 1e3,
        "most_us": max(latencies) / 1e3,
        "clock_us": min(clock, default=0) / 1e3,
        "dispatch_block_gb_per_s": float(np.median([rate for rates, _ in dispatch for rate in rates])),
        "dispatch_all_gb_per_s": float(np.median([rate for _, rate in dispatch])),
        "combine_block_gb_per_s": float(np.median([rate for rates, _ in combine for rate in rates])),
        "combine_all_gb_per_s": float(np.median([rate for _, rate in combine])),
        "ok": len(latencies) == len(calls) * config.num_ranks * config.num_experts,
    }


def signal_latencies(records: list[Slice]) -> list[int]:
    """Nanoseconds of every packet, empty ones too."""
    sent = {(r.rank, r.peer, r.expert): r.end_ns for r in records if r.kind == DISPATCH}
    seen = {(r.peer, r.rank, r.expert): r.start_ns for r in records if r.kind == RECEIVE}
    return [seen[packet] - sent[packet] for packet in sent if packet in seen]


def clock_steps(records: list[Slice]) -> list[int]:
    """Differences of times that follow each other: the least is what the clock can tell apart."""
    times = sorted({time for record in records for time in (record.start_ns, record.end_ns)})
    return np.diff(times).tolist()


def packet_rates(records: list[Slice], config: MoEConfig) -> tuple[list[float], float]:
    """(bytes per nanosecond of each DISPATCH with rows, of all together), counted as written."""
    rows = {(r.peer, r.rank, r.expert): r.n for r in records if r.kind == RECEIVE}
    tasks = [(r, rows.get((r.rank, r.peer, r.expert), 0)) for r in records if r.kind == DISPATCH]
    row_bytes = config.hidden * config.format.num_bytes
    return rates([(r.start_ns, r.end_ns, num_rows * row_bytes) for r, num_rows in tasks])


def combine_rates(records: list[Slice], config: MoEConfig) -> tuple[list[float], float]:
    """The same for COMBINE, counted as read: a token reads a row for each of its choices."""
    row_bytes = config.hidden * config.format.num_bytes
    tokens = min(config.token_block, config.num_tokens)
    tasks = [(r.start_ns, r.end_ns, tokens * config.num_topk * row_bytes) for r in records if r.kind == COMBINE]
    return rates(tasks)


def rates(tasks: list[tuple[int, int, int]]) -> tuple[list[float], float]:
    """(start, end, bytes) of tasks -> (rate of each, of all from the first start to the last end)."""
    full: Any = [task for task in tasks if task[2] > 0]
    if not full:
        return [0.0], 0.0
    span = max(end for _, end, _ in full) - min(begin for begin, _, _ in full)
    total = sum(num_bytes for _, _, num_bytes in full)
    return [num_bytes / max(end - begin, 1) for begin, end, num_bytes in full], total / max(span, 1)


if __name__ == "__main__":
    sys.exit(main())
