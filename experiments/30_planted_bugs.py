"""Question: how soon does the explorer find a bug in the kernel, under each strategy, and what does it call it?

Command:  python experiments/30_planted_bugs.py [--starts N] [--json FILE]
Expected: every planted bug is found, by a report that fits it, in the world that it names; most in the first run.

A bug is one edit of the kernel's source, and names a world (flashmoe_numba/explore/plants.toml, worlds.py). There it is
looked for under each strategy: `runs` are until a report fits, the median over several first seeds, and `most` of them;
-1: none in those tried. `default` are the runs that `flashmoe explore --plant NAME` takes, whose 100 seeds go through
all worlds in turn; -1: none of them finds it.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
from common import Row, parser_of, show, store

from flashmoe_numba.commands.explore import SEEDS
from flashmoe_numba.explore.choose.strategies import STRATEGIES
from flashmoe_numba.explore.hunt import find, searches
from flashmoe_numba.explore.plants import PLANTS
from flashmoe_numba.explore.search import search_of
from flashmoe_numba.explore.worlds import WORLDS

NUM_SEEDS = 60
COLUMNS = {"plant": "", "world": "", "strategy": "", "runs": ".0f", "most": "d", "default": "d", "reports": ""}


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
    by_default = {row["plant"] for row in rows if row["default"] > 0}
    print(
        f"\n{len(found)} of {len(names)} planted bugs found in their worlds, under some strategy from every first seed"
    )
    print(f"{len(by_default)} found by flashmoe explore without a world")
    return 0 if len(found) == len(names) else 1


def row(name: str, strategy: str, starts: int) -> Row:
    plant, (search,) = PLANTS[name], searches(name, [PLANTS[name].world], [strategy])
    seeds = [range(1000 * start, 1000 * start + NUM_SEEDS) for start in range(starts)]
    found = [find(name, [(search, seed) for seed in some]) for some in seeds]
    runs = [run for run, _ in found]
    return {
        "plant": name,
        "world": plant.world,
        "strategy": strategy,
        "runs": float(np.median(runs)) if min(runs) > 0 else -1.0,
        "most": max(runs) if min(runs) > 0 else -1,
        "default": by_default(name) if strategy == STRATEGIES[0] else 0,
        "reports": ", ".join(sorted(set().union(*(seen for _, seen in found)) & set(plant.found_by))),
    }


def by_default(name: str) -> int:
    """Runs of all worlds in turn, under random interleavings."""
    several = searches(name, WORLDS, STRATEGIES[:1])
    return find(name, [(search_of(several, seed), seed) for seed in range(SEEDS)])[0]


if __name__ == "__main__":
    sys.exit(main())
