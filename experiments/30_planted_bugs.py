"""Question: how soon does the explorer find a bug in the kernel, under each strategy, and what does it call it?

Command:  python experiments/30_planted_bugs.py [--starts N] [--json FILE]
Expected: every planted bug is found, by a report that fits it, within the seeds tried; most in the first run.

A bug is one edit of the kernel's source (flashmoe_numba/explore/plants.py). Five small worlds are run in turn, seed
after seed, until a report fits. `runs` are until then, the median over several first seeds; -1: none in those tried.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
from common import Row, parser_of, show, store

from flashmoe_numba.explore.hunt import find
from flashmoe_numba.explore.plants import PLANTS
from flashmoe_numba.explore.strategies import STRATEGIES

NUM_SEEDS = 12
COLUMNS = {"plant": "", "strategy": "", "runs": ".0f", "most": "d", "reports": ""}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--starts", type=int, default=3, help="first seeds over which the median is taken [3]")
    args = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)  # of whatever a bug computes
    names = list(PLANTS)[:3] if args.smoke else list(PLANTS)
    rows = [row(name, strategy, 1 if args.smoke else args.starts) for name in names for strategy in STRATEGIES]
    show(rows, COLUMNS)
    store(rows, args.json)
    found = {row["plant"] for row in rows if row["most"] > 0}
    print(f"\n{len(found)} of {len(names)} planted bugs found under some strategy from every first seed")
    return 0 if len(found) == len(names) else 1


def row(name: str, strategy: str, starts: int) -> Row:
    found = [find(name, [strategy], range(1000 * start, 1000 * start + NUM_SEEDS)) for start in range(starts)]
    runs = [run for run, _ in found]
    return {
        "plant": name,
        "strategy": strategy,
        "runs": float(np.median(runs)) if min(runs) > 0 else -1.0,
        "most": max(runs) if min(runs) > 0 else -1,
        "reports": ", ".join(sorted(set().union(*(seen for _, seen in found)) & set(PLANTS[name].found_by))),
    }


if __name__ == "__main__":
    sys.exit(main())
