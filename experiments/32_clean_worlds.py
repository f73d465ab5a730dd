"""Question: is the kernel clean under very many interleavings of many small worlds?

Command:  python experiments/32_clean_worlds.py [--seeds N] [--jobs N] [--json FILE]   (or under mpirun, without --jobs)
Expected: no report in any world; exit status 1, with the command that replays it, if there is one.

Each world is explored as by `flashmoe explore` with the flags shown: races, stale words, deadlocks, counts, results.
Most seeds go to random interleavings, some to PCT and to turns. A search that FILE has is not run again, so a matrix
that was stopped goes on by the same command; when the kernel or the explorer has changed, begin a new file.

Columns: runs/s of one process, switches/s of all together, and reports of the first run of a world that was not clean.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

from common import Row, parser_of, show, store
from explore_common import search_of

from flashmoe_numba.bench import launch
from flashmoe_numba.commands import UsageError
from flashmoe_numba.commands.spread import STOPS, add_jobs_argument, open_pool, progress, stopped_status, why_stopped
from flashmoe_numba.explore.search import explore

# Small, so that a run takes some 20 ms, but each with something that the others have not.
# --world chooses the counts of tokens and the routing of all calls but the first.
WORLDS = {
    "smallest": "--ranks 2 --processors 1 --lanes 1 --tokens 3 --topk 1 --epochs 1",
    "two processors": "--ranks 2 --processors 2 --lanes 1 --tokens 3 --topk 2 --epochs 2",
    "three processors": "--ranks 2 --processors 3 --lanes 1 --tokens 3 --topk 3 --epochs 2",
    "several tiles a packet": "--ranks 2 --processors 2 --lanes 1 --tokens 9 --experts 2 --topk 1 --epochs 1",
    "three calls": "--ranks 2 --processors 1 --lanes 1 --tokens 3 --experts 2 --topk 1 --epochs 3",
    "three ranks": "--ranks 3 --processors 1 --lanes 1 --tokens 2 --experts 3 --topk 2 --epochs 2",
    "three ranks, top 3": "--ranks 3 --processors 2 --lanes 1 --tokens 2 --experts 6 --topk 3 --epochs 1",
    "four ranks": "--ranks 4 --processors 1 --lanes 1 --tokens 2 --topk 1 --epochs 2",
    "four ranks, three calls": "--ranks 4 --processors 2 --lanes 1 --tokens 1 --topk 1 --epochs 3",
    "two lanes": "--ranks 2 --processors 2 --lanes 2 --tokens 2 --experts 2 --topk 1 --epochs 2",
    "three lanes": "--ranks 2 --processors 1 --lanes 3 --tokens 3 --experts 2 --topk 2 --epochs 1",
    "four lanes": "--ranks 2 --processors 1 --lanes 4 --tokens 2 --experts 2 --topk 1 --epochs 2",
    "drops": "--ranks 2 --processors 2 --lanes 1 --tokens 3 --topk 3 --epochs 3 --capacity 1 --world 8",
    "hot expert": "--ranks 2 --processors 2 --lanes 1 --tokens 4 --topk 1 --epochs 2 --world 8",
    "ranks without tokens": "--ranks 2 --processors 1 --lanes 1 --tokens 3 --topk 2 --epochs 3 --world 2",
    "bfloat16": "--ranks 2 --processors 2 --lanes 1 --tokens 4 --topk 2 --epochs 1"
    " --dtype bfloat16 --no-gated --no-renormalize",
    "one leaves": "--ranks 3 --processors 1 --lanes 1 --tokens 2 --experts 3 --topk 1 --epochs 2 --leaver 1",
    "two leave": "--ranks 3 --processors 1 --lanes 1 --tokens 2 --experts 3 --topk 1 --epochs 2 --leaver 0 --leaver 2",
}
SHARES = {"random": 70, "pct": 20, "round-robin": 10}  # per cent of the seeds
COLUMNS = {"world": "", "runs": "d", "seconds": ".0f", "runs/s": ".0f", "switches/s": ",.0f", "reports": "d"}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, metavar="N", help="of each world [10000]")
    add_jobs_argument(parser.add_argument)
    args = parser.parse_args()
    alone = args.smoke and not launch.inside_mpirun()
    try:
        with open_pool(1 if alone else args.jobs) as pool:
            return run_all(args, pool) if launch.is_first_rank() else 0
    except UsageError as error:
        parser.error(str(error))


def run_all(args: argparse.Namespace, pool: Executor | None) -> int:
    worlds = list(WORLDS)[:: 5 if args.smoke else 1]
    done = rows_of(args.json)
    rows: list[Row] = []
    try:
        for world in worlds:
            for row in run_world(world, 10 if args.smoke else args.seeds, done, pool):
                rows.append(row)
                store([row] if row not in done else [], args.json)
                print(f"{row['command']}: {'; '.join(row['reports']) or 'clean'}", flush=True)
    except STOPS as stop:
        print(f"{why_stopped(stop)}; {len(rows)} of {len(worlds) * len(SHARES)} searches are done", file=sys.stderr)
        return stopped_status(stop)
    print()
    show([summary(world, [row for row in rows if row["world"] == world]) for world in worlds], COLUMNS)
    bad = [row for row in rows if row["reports"]]
    print("\n".join(f"replay: {row['replay']}" for row in bad) or f"\nall {len(worlds)} worlds are clean")
    return 1 if bad else 0


def rows_of(file: Path | None) -> list[Row]:
    """What earlier commands have stored."""
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def run_world(world: str, seeds: int, done: list[Row], pool: Executor | None) -> Iterator[Row]:
    """A row for each strategy: the clean one that is there already, or a new one."""
    for strategy, share in SHARES.items():
        flags = f"{WORLDS[world]} --strategy {strategy}"
        count = seeds * share // 100
        text = f"flashmoe explore {flags} --seeds {count}"
        old = [row for row in done if row["command"] == text and not row["reports"]]
        yield old[0] if old else {"world": world, "command": text} | run(flags, count, pool)


def run(flags: str, seeds: int, pool: Executor | None) -> Row:
    """Until the first run that is not clean."""
    runs, switches, busy_s, start = 0, 0, 0.0, time.perf_counter()
    reports, replay = [], None
    for outcome in progress(explore(search_of(flags), range(seeds), pool), seeds, "runs"):
        runs, switches, busy_s = runs + 1, switches + outcome.switches, busy_s + outcome.seconds
        if outcome.reports:
            reports = [str(report) for report in outcome.reports]
            replay = f"flashmoe explore {flags} --seed {outcome.seed} --seeds 1"
            break
    wall_s = time.perf_counter() - start
    return dict(runs=runs, seconds=wall_s, busy_s=busy_s, switches=switches, reports=reports, replay=replay)


def summary(world: str, rows: list[Row]) -> Row:
    total = {key: sum(row[key] for row in rows) for key in ("runs", "seconds", "busy_s", "switches")}
    return {
        "world": world,
        "runs/s": total["runs"] / total["busy_s"],
        "switches/s": total["switches"] / total["seconds"],
        "reports": sum(len(row["reports"]) for row in rows),
        **total,
    }


if __name__ == "__main__":
    sys.exit(main())
