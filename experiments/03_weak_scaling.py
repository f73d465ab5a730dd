"""Question: what does it cost to spread the layer over more ranks, each with as many tokens as before?

Command:  python experiments/03_weak_scaling.py [--repeats N]
Expected: every run passes. `ratio` is the latency over the ideal one: that of one rank, times the ranks that share a
          core when there are more ranks than cores. On a machine of its own it stays below 1.5: signals and waiting for
          the busiest rank (text spreads unevenly over experts) are what is added.

Each point is a `flashmoe run` with one processor per rank, started by this script. Repeats go round all numbers of
ranks; medians over the repeats of each run's median are shown.
"""

from __future__ import annotations

import sys
from statistics import median

from common import Row, flashmoe_run, parser_of, show, store

from flashmoe_numba.processes.cores import count_cores

RANKS = (1, 2, 4, 8)
COLUMNS = {
    "ranks": "d",
    "latency_ms": ".2f",
    "tokens_per_s": ",.0f",
    "gflops": ".1f",
    "blas_share": ".2f",
    "ratio": ".2f",
    "ok": "",
}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs per number of ranks [3]")
    args = parser.parse_args()
    rank_counts = RANKS[:2] if args.smoke else RANKS
    preset, iterations = ("laptop-tiny", 2) if args.smoke else ("laptop-text", 5)
    repeats = 1 if args.smoke else args.repeats
    how = dict(preset=preset, processors=1, iterations=iterations)
    reports = [[flashmoe_run(ranks=ranks, **how) for ranks in rank_counts] for _ in range(repeats)]
    rows = [summary(list(runs)) for runs in zip(*reports, strict=True)]
    add_ratio(rows)
    show(rows, COLUMNS)
    store(rows, args.json)
    return 0 if all(row["ok"] for row in rows) else 1


def summary(reports: list[Row]) -> Row:
    """One number of ranks."""
    return {
        "ranks": reports[0]["ranks"],
        "latency_ms": median(report["latency_ms"]["median"] for report in reports),
        **{key: median(report[key] for report in reports) for key in ("tokens_per_s", "gflops", "blas_share")},
        "repeats": len(reports),
        "ok": all(report["passed"] for report in reports),
    }


def add_ratio(rows: list[Row]) -> None:
    """Latency over the ideal one, to each row; the first is the measure."""
    cores = count_cores()
    for row in rows:
        row["cores"] = cores
        row["ratio"] = row["latency_ms"] / (rows[0]["latency_ms"] * max(1, row["ranks"] / cores))


if __name__ == "__main__":
    sys.exit(main())
