"""What experiments on several hosts share, made of network namespaces: can this machine have them, and how many?"""

from __future__ import annotations

import argparse

from common import leave
from hosts import namespaces

from flashmoe_numba.commands.flags import integer


def add_hosts(parser: argparse.ArgumentParser, ranks_per_host: int) -> None:
    """`--hosts` and `--ranks-per-host`, the latter with this default."""
    parser.add_argument("--hosts", type=integer(2), default=2, help="[2]")
    parser.add_argument("--ranks-per-host", type=integer(1), default=ranks_per_host, help=f"[{ranks_per_host}]")


def require_hosts(args: argparse.Namespace) -> None:
    """Leave, if there can be none here."""
    if lack := namespaces.lacking():
        leave(lack, args)
