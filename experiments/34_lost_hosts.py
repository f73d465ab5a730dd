"""Question: what do the ranks of a layer on several hosts get when a rank, a host or a cable is lost at any moment?

Command:  python experiments/34_lost_hosts.py [--runs N] [--json FILE]     as root, on Linux with iproute2
Expected: the results of one process, bit for bit, or an error that names who was lost, not later than the deadline and
          a slack; never anything else. Exit status 1 if there was anything else.

A run is 2 hosts of 2 ranks, or as --hosts and --ranks-per-host say, made of network namespaces (hosts/namespaces.py);
mpirun runs on one more. The ranks make calls with other numbers of tokens each time, every third one with its backward.
At a moment drawn from the seed one of the faults of hosts/faults.py befalls them.

`right` and `named` count ranks: all its results were right, or its error names who was lost. `other`: it names a rank
that waited itself. `ended`: by mpirun, which gives up where a whole host's processes die. `over_ms` is the longest time
from a fault to an error, less the deadline. `problems` are hangs, wrong results, crashes, late errors, errors without a
name, ranks that should have gone on, and processes, shared memory and files that are left.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

import numpy as np
from common import Row, store
from hosts.faults import FAULTS
from hosts.trial import Size, Verdict, one_trial
from hosts_common import add_hosts, require_hosts
from lost_common import lost_parser, row_of, show_rows, tell, terms

COLUMNS = {
    "fault": "", "runs": "d", "calls": "d", "right": "d", "named": "d", "other": "d", "ended": "d", "over_ms": "",
    "problems": "d",
}  # fmt: skip


def main() -> int:
    args = arguments()
    require_hosts(args)
    size = Size(num_hosts=args.hosts, ranks_per_host=args.ranks_per_host, deadline_s=args.deadline_s)
    names = args.fault or list(FAULTS)
    runs: list[tuple[int, str]] = list(zip(range(1 if args.smoke else args.runs), itertools.cycle(names), strict=False))
    verdicts: dict[str, list[Verdict]] = {name: [] for _, name in runs}
    try:
        for number, name in runs:
            verdicts[name].append(one_trial(name, size, np.random.default_rng([args.seed, number])))
            tell(number, name, verdicts[name][-1])
    except KeyboardInterrupt:
        print("interrupted: what was done until then", flush=True)
    rows = [row(name, of_fault) for name, of_fault in verdicts.items() if of_fault]
    show_rows(rows, COLUMNS)
    how = terms(args, "hosts", "ranks_per_host")
    store([row | how for row in rows], args.json)
    return 1 if any(row["problems"] for row in rows) else 0


def arguments() -> argparse.Namespace:
    parser = lost_parser(__doc__, FAULTS, runs=200, of_what="", deadline_s=2.0)
    add_hosts(parser, ranks_per_host=2)
    args: argparse.Namespace = parser.parse_args()
    return args


def row(fault: str, verdicts: Sequence[Verdict]) -> Row:
    calls, ended = (sum(getattr(verdict, what) for verdict in verdicts) for what in ("calls", "ended"))
    return row_of(fault, verdicts) | {"calls": calls, "ended": ended}


if __name__ == "__main__":
    sys.exit(main())
