"""Question: what do the other ranks of a layer get when one is killed, stopped, raises or slows down at any moment?

Command:  python experiments/31_lost_ranks.py [--backward] [--runs N] [--mpirun N] [--json FILE]
Expected: on every rank the undisturbed results, bit for bit, or an error that names what it waited for, not later than
          the deadline and a slack; never anything else. Exit status 1 if there was anything else.

A run is 2 to 4 forked processes that make calls in a row by the compiled kernel on shared memory. At a moment drawn
from the seed one of them suffers a fault: see experiments/lost/faults.py. With --backward every other call is the
backward of the one before it. With --mpirun, runs of `flashmoe run` under mpirun are added, of which a rank is killed
or stopped.

`right` and `named` count ranks: all its results were right, or its error names the victim. `other`: it names a rank
that waited itself, under mpirun also one that gave up between two calls and left. `over_ms` is the longest time from a
fault to an error, less the deadline (under mpirun to the end of all processes). `problems` are hangs, wrong results,
crashes, late errors, errors without a name, and things left behind. The second table shows where signals met their
rank: in a kind of task, or at what else.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
from common import Row, show, store
from lost import mpi
from lost.faults import FAULTS
from lost.lose import lose_one
from lost.memory import PLACES
from lost.verdict import Verdict
from lost.world import make_trial
from lost_common import lost_parser, row_of, show_rows, tell, terms

from flashmoe_numba.commands.flags import integer, seconds
from reference.layout import SAVES

RANKS = (2, 3, 4)
COLUMNS = {"fault": "", "runs": "d", "right": "d", "named": "d", "other": "d", "over_ms": "", "problems": "d"}


def main() -> int:
    args = arguments()
    args.backward = args.backward or args.smoke
    save = SAVES[0] if args.backward else None
    worlds = {n: make_trial(n, args.calls, args.deadline_s, save=save) for n in RANKS}
    names = args.fault or list(FAULTS)
    runs = list(zip(range(len(names) if args.smoke else args.runs), itertools.cycle(names), strict=False))
    runs += list(zip(range(args.mpirun), itertools.cycle(mpi.FAULTS), strict=False))
    verdicts: dict[str, list[Verdict]] = {name: [] for _, name in runs}
    for number, name in runs:
        rng = np.random.default_rng([args.seed, number])
        if name in mpi.FAULTS:
            verdict = mpi.one_run(name, rng, args.backward)
        else:
            world = worlds[int(rng.choice(RANKS[1:] if name == "kill-two" else RANKS))]
            verdict = lose_one(world, FAULTS[name], rng, args.slack_s)
        verdicts[name].append(verdict)
        tell(number, name, verdict)
    rows = [row(name, of_fault) for name, of_fault in verdicts.items()]
    report(rows)
    how = terms(args, "backward", "calls", "slack_s")
    store([row | how for row in rows], args.json)
    return 1 if any(row["problems"] for row in rows) else 0


def arguments() -> argparse.Namespace:
    parser = lost_parser(__doc__, FAULTS, runs=400, of_what="of forked ranks, ", deadline_s=0.5)
    parser.add_argument("--backward", action="store_true", help="every other call is a backward")
    parser.add_argument("--mpirun", type=integer(0), default=0, metavar="N", help="runs under mpirun [0]")
    parser.add_argument("--calls", type=integer(1), default=20, help="of each rank in a run [20]")
    parser.add_argument("--slack-s", type=seconds, default=0.2, help="what an error may take beyond the deadline [0.2]")
    args: argparse.Namespace = parser.parse_args()
    return args


def row(fault: str, verdicts: Sequence[Verdict]) -> Row:
    return row_of(fault, verdicts) | {"fell": dict(Counter(place for verdict in verdicts for place in verdict.fell))}


def report(rows: Sequence[Row]) -> None:
    """Both tables."""
    show_rows(rows, COLUMNS)
    print()
    where = [{"fault": row["fault"]} | {place: row["fell"].get(place, 0) for place in PLACES} for row in rows]
    show([row for row in where if any(row[place] for place in PLACES)], {"fault": ""} | dict.fromkeys(PLACES, "d"))


if __name__ == "__main__":
    sys.exit(main())
