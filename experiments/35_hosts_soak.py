"""Question: do layers on several hosts keep the bits of one process, call after call, and does anything grow?

Command:  python experiments/35_hosts_soak.py [--hosts N] [--ranks-per-host N] [--calls N] [--load N] [--json FILE]
          as root, on Linux with iproute2
Expected: every result and every gradient as in one process, bit for bit, and nothing that grows; no hang, no crash, and
          nothing left behind. Exit status 1 if there was anything else.

Hosts are network namespaces of this machine (hosts/namespaces.py). In each round layers are made one after the other:
one of each element type, with every `save`, whose calls have other numbers of tokens each time and every third one its
backward; and one whose packets have several megabytes. --load adds so many processes that keep cores busy.

`wrong` counts results of ranks. `blocks` of Python, `allocated_kib` by the C allocator, `resident_kib` without what it
keeps free, `free_kib`, `descriptors` and `threads` of a process and `shared_kib` of its host's shared memory are what
the rank that grew most grew by between the ends of the first and of the last round, when no layer is open; `layer_kib`
likewise `allocated_kib`, in the last two thirds of the calls of a layer, of the layer of a later round that grew most.
`load` is the system's over the last five minutes.
"""

from __future__ import annotations

import argparse
import sys

from common import machine, parser_of, program, show, store
from hosts.soak import one_soak
from hosts_common import add_hosts, require_hosts

from flashmoe_numba.commands.flags import integer

COLUMNS = {
    "hosts": "d", "ranks_per_host": "d", "layers": "d", "calls": "d", "wrong": "d", "seconds": ".0f", "load": ".1f",
    "blocks": "+d", "allocated_kib": "+d", "free_kib": "+d", "resident_kib": "+d", "descriptors": "+d", "threads": "+d",
    "shared_kib": "+d", "layer_kib": "+d", "problems": "d",
}  # fmt: skip


def main() -> int:
    args = arguments()
    require_hosts(args)
    if args.smoke:
        args.ranks_per_host, args.rounds, args.calls = 1, 2, 200
    found = one_soak(args.hosts, args.ranks_per_host, args.rounds, args.calls, args.load)
    for problem in found.problems:
        print(problem, flush=True)
    row = {"hosts": args.hosts, "ranks_per_host": args.ranks_per_host, "rounds": args.rounds} | found.row()
    show([row], COLUMNS)
    store([row | machine() | program(["mpi4py", "mpich", "numba", "numpy"])], args.json)
    return 1 if found.problems else 0


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_hosts(parser, ranks_per_host=4)
    parser.add_argument("--rounds", type=integer(2), default=5, help="of layers that are made anew [5]")
    parser.add_argument("--calls", type=integer(1), default=10_000, help="over all layers [10000]")
    parser.add_argument("--load", type=integer(0), default=0, help="processes that keep cores busy meanwhile [0]")
    args: argparse.Namespace = parser.parse_args()
    return args


if __name__ == "__main__":
    sys.exit(main())
