"""Question: what do the ranks of a layer on several hosts get when a rank, a host or a cable is lost at any moment?

Command:  python experiments/34_lost_hosts.py [--runs N] [--calls N] [--json FILE]     as root, on Linux with iproute2
Expected: the results of one process, bit for bit, or an error that names who was lost, not later than the deadline and
          a slack; never anything else. Exit status 1 if there was anything else.

A run is 2 hosts of 2 ranks, or as --hosts and --ranks-per-host say, made of network namespaces (hosts/namespaces.py);
mpirun runs on one more. The ranks make calls with other numbers of tokens each time. At a moment drawn from the seed
one of the faults of hosts/faults.py befalls them. --calls adds a run without a fault, of so many calls.

`right` and `named` count ranks: all its results were right, or its error names who was lost. `other`: it names a rank
that waited itself. `ended`: by mpirun, which gives up where a whole host's processes die. `over_ms` is the longest time
from a fault to an error, less the deadline. `problems` are hangs, wrong results, crashes, late errors, errors without a
name, ranks that should have gone on, and processes that are left.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence

import numpy as np
from common import Row, leave, machine, parser_of, show, store
from hosts import namespaces
from hosts.faults import FAULTS
from hosts.trial import Size, Verdict, one_trial

NONE = "none"
COLUMNS = {
    "fault": "", "runs": "d", "calls": "d", "right": "d", "named": "d", "other": "d", "ended": "d", "over_ms": "",
    "problems": "d",
}  # fmt: skip


def main() -> int:
    args = arguments()
    lack = namespaces.why_not() or namespaces.missing_tools()
    if lack:
        leave(lack, args)
    size = Size(num_hosts=args.hosts, ranks_per_host=args.ranks_per_host, deadline_s=args.deadline_s)
    names = args.fault or list(FAULTS)
    runs: list[tuple[int, str]] = list(zip(range(1 if args.smoke else args.runs), itertools.cycle(names), strict=False))
    verdicts: dict[str, list[Verdict]] = {name: [] for _, name in runs}
    try:
        for number, name in runs:
            tell(number, name, verdicts[name], one_trial(name, size, np.random.default_rng([args.seed, number])))
        if args.calls and not args.smoke:
            verdicts[NONE] = []
            verdict = one_trial(None, size, np.random.default_rng(args.seed), args.calls)
            tell(len(runs), NONE, verdicts[NONE], verdict)
    except KeyboardInterrupt:
        print("interrupted: what was done until then", flush=True)
    rows = [row(name, of_fault) for name, of_fault in verdicts.items() if of_fault]
    show([row | {"over_ms": "" if row["over_ms"] is None else f"{row['over_ms']:.0f}"} for row in rows], COLUMNS)
    store([row | terms(args) for row in rows], args.json)
    return 1 if any(row["problems"] for row in rows) else 0


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=200, help="over all faults [200]")
    parser.add_argument("--calls", type=int, default=0, help="of one more run, without a fault [0]")
    parser.add_argument("--hosts", type=int, default=2, help="of a run [2]")
    parser.add_argument("--ranks-per-host", type=int, default=2, help="[2]")
    parser.add_argument("--deadline-s", type=float, default=2.0, help="of a call [2]")
    parser.add_argument("--fault", choices=FAULTS, action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    args: argparse.Namespace = parser.parse_args()
    return args


def terms(args: argparse.Namespace) -> Row:
    """What a row was measured on, and how."""
    return machine() | {name: getattr(args, name) for name in ("hosts", "ranks_per_host", "deadline_s", "seed")}


def tell(number: int, name: str, verdicts: list[Verdict], verdict: Verdict) -> None:
    verdicts.append(verdict)
    for problem in verdict.problems:
        print(f"run {number}, {name}: {problem}", flush=True)
    for text in verdict.other:
        print(f"run {number}, {name}, other: {text}", flush=True)


def row(fault: str, verdicts: Sequence[Verdict]) -> Row:
    return {
        "fault": fault,
        "runs": len(verdicts),
        "calls": sum(verdict.calls for verdict in verdicts),
        "right": sum(verdict.right for verdict in verdicts),
        "named": sum(verdict.named for verdict in verdicts),
        "other": sum(len(verdict.other) for verdict in verdicts),
        "ended": sum(verdict.ended for verdict in verdicts),
        "over_ms": max((ms for verdict in verdicts for ms in verdict.over_ms), default=None),
        "problems": sum(len(verdict.problems) for verdict in verdicts),
    }


if __name__ == "__main__":
    sys.exit(main())
