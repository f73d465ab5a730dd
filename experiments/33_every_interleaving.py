"""Question: is the kernel clean under every interleaving of very small worlds, and how many are there?

Command:  python experiments/33_every_interleaving.py [--most N] [--json FILE]
Expected: no report, and every world comes to its end; exit status 1 otherwise.

Interleavings that differ only in the order of accesses to different words, or of loads of one word, count as one: no
thread can tell them apart. One lane a block, one processor unless said otherwise. Runs are what it took: those that
could not be completed, because a thread was made to look at a word too early, and those cut short as redundant are
among them.
"""

from __future__ import annotations

import sys
import time
from itertools import islice

from common import Row, parser_of, show, store
from explore_common import search_of

from flashmoe_numba.explore.choose.choice_tree import COMPLETE
from flashmoe_numba.explore.exhaustive import explore_all

BACKWARD = "--program 0,1 --dtype float64 --save"
WORLDS = {
    "one rank, one packet": "--ranks 1 --experts 1 --topk 1 --epochs 1",
    "one rank, two packets": "--ranks 1 --experts 2 --topk 2 --epochs 1",
    "one rank, an empty packet": "--ranks 1 --experts 2 --topk 1 --epochs 1",
    "one rank, two calls": "--ranks 1 --experts 1 --topk 1 --epochs 2",
    "one rank, three calls": "--ranks 1 --experts 1 --topk 1 --epochs 3",
    "one rank, two processors": "--ranks 1 --experts 1 --topk 1 --epochs 1 --processors 2",
    "one rank, two packets, two calls": "--ranks 1 --experts 2 --topk 2 --epochs 2",
    "one rank, a forward and its backward": f"--ranks 1 --experts 1 --topk 1 {BACKWARD} rows+up",
    "one rank, its rows sent again": f"--ranks 1 --experts 1 --topk 1 {BACKWARD} nothing",
    "one rank, an empty packet back": f"--ranks 1 --experts 2 --topk 1 {BACKWARD} rows+up",
    "two ranks, one packet each": "--ranks 2 --experts 2 --topk 1 --epochs 1",
    "two ranks, two sources in a row tile": "--ranks 2 --experts 2 --topk 1 --epochs 1 --data-seed 2",
}
COMMON = "--strategy exhaustive --processors 1 --tokens 1 --hidden 2 --ffn 2"
COLUMNS = {"world": "", "interleavings": ",d", "runs": ",d", "whole": "", "seconds": ".0f", "reports": "d"}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--most", type=int, metavar="N", help="runs of each world [no limit]")
    args = parser.parse_args()
    worlds = list(WORLDS)[:2] if args.smoke else list(WORLDS)
    rows = []
    for world in worlds:
        rows.append(run(world, args.most))
        store(rows[-1:], args.json)
        print(f"{rows[-1]['command']}: {'; '.join(rows[-1]['told']) or 'clean'}", flush=True)
    print()
    show(rows, COLUMNS)
    return 0 if all(row["whole"] == "yes" and not row["reports"] for row in rows) else 1


def run(world: str, most: int | None) -> Row:
    """Until all runs have been made, or the first that is not clean."""
    flags = f"{COMMON} {WORLDS[world]}"
    start, runs, interleavings, whole, told = time.perf_counter(), 0, 0, False, []
    for outcome in islice(explore_all(search_of(flags)), most):
        runs, interleavings, whole = runs + 1, interleavings + (outcome.end == COMPLETE), outcome.is_last
        told = [str(report) for report in outcome.reports]
        if told:
            break
    return {
        "world": world,
        "command": f"flashmoe explore {flags}",
        "interleavings": interleavings,
        "runs": runs,
        "whole": "yes" if whole else "no",
        "seconds": time.perf_counter() - start,
        "reports": len(told),
        "told": told,
    }


if __name__ == "__main__":
    sys.exit(main())
