"""Question: is the kernel clean under very many interleavings of many small worlds?

Command:  python experiments/32_clean_worlds.py [--seeds N] [--backward] [--hosts] [--jobs N] [--json FILE]
          (or under mpirun, without --jobs)
Expected: no report in any world; exit status 1, with the command that replays it, if there is one.

Each named world (flashmoe_numba/explore/worlds.py) is explored as by `flashmoe explore` with the flags shown: races,
stale words, deadlocks, counts, results, gradients, and who is blamed where a rank is lost or makes another call.
Most seeds go to random interleavings, some to PCT and to turns. A search that FILE has is not run again, so a matrix
that was stopped goes on by the same command; when the kernel or the explorer has changed, begin a new file.

Columns: runs/s of one process, switches/s of all together, and reports of the first run of a world that was not clean.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from pathlib import Path

from common import Row, parser_of, show, store
from explore_common import search_of

from flashmoe_numba.commands.spread import STOPS, add_jobs_argument, open_pool, progress, stopped_status, why_stopped
from flashmoe_numba.errors import UsageError
from flashmoe_numba.explore import worlds
from flashmoe_numba.explore.run.spec import WorldSpec
from flashmoe_numba.explore.search import explore
from flashmoe_numba.processes import launch

WORLDS = {name: f"--world {shlex.quote(name)}" for name in worlds.WORLDS}
SHARES = {"random": 70, "pct": 20, "round-robin": 10}  # per cent of the seeds
COLUMNS = {"world": "", "runs": "d", "seconds": ".0f", "runs/s": ".0f", "switches/s": ",.0f", "reports": "d"}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, metavar="N", help="of each world [10000]")
    parser.add_argument("--backward", action="store_true", help="only worlds that have backwards")
    parser.add_argument("--hosts", action="store_true", help="only worlds of several hosts")
    add_jobs_argument(parser.add_argument)
    args = parser.parse_args()
    alone = args.smoke and not launch.inside_mpirun()
    try:
        with open_pool(1 if alone else args.jobs) as pool:
            return run_all(args, pool) if launch.is_first_rank() else 0
    except UsageError as error:
        parser.error(str(error))


def run_all(args: argparse.Namespace, pool: Executor | None) -> int:
    names = [name for name in WORLDS if fits(args, search_of(WORLDS[name]).spec)][:: 5 if args.smoke else 1]
    done = rows_of(args.json)
    rows: list[Row] = []
    try:
        for world in names:
            for row in run_world(world, 10 if args.smoke else args.seeds, done, pool):
                rows.append(row)
                store([row] if row not in done else [], args.json)
                print(f"{row['command']}: {'; '.join(row['reports']) or 'clean'}", flush=True)
    except STOPS as stop:
        print(f"{why_stopped(stop)}; {len(rows)} of {len(names) * len(SHARES)} searches are done", file=sys.stderr)
        return stopped_status(stop)
    print()
    show([summary(world, [row for row in rows if row["world"] == world]) for world in names], COLUMNS)
    bad = [row for row in rows if row["reports"]]
    print("\n".join(f"replay: {row['replay']}" for row in bad) or f"\nall {len(names)} worlds are clean")
    return 1 if bad else 0


def fits(args: argparse.Namespace, spec: WorldSpec) -> bool:
    """Is it one of the worlds that are asked for?"""
    return (any(spec.program) or not args.backward) and (spec.hosts > 1 or not args.hosts)


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
