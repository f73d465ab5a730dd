"""How commands go to other hosts, and what is to be known of ranks on several."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from reference import MoEConfig

from ..errors import UsageError
from ..processes import launch
from ..processes.destinations import LAUNCHERS, Destinations, check_launcher, find_starter
from .flags import blaming

if TYPE_CHECKING:
    from ..processes.together import LocalRanks, MpiRanks


def add_hosts_arguments(where: Any, add: Any, what: str) -> None:
    """`--hosts` and `--launcher`; `where` is what the former is added to, and `add` adds the latter."""
    where.add_argument("--hosts", metavar="A,B", help=f"{what}; see docs/clusters.md")
    ways = f"how to get there: {', '.join(LAUNCHERS)}, or a program that is called as ssh is"
    add("--launcher", metavar="NAME", help=f"{ways} [ssh]")


def hosts_from(
    args: argparse.Namespace, inside: str = "the hosts are those of this mpirun: start this without --hosts"
) -> Destinations | None:
    """Those of the flags, if there are any and this is no rank that was started there.

    Args:
        inside: what is wrong with --hosts inside a user's own mpirun.
    """
    if args.hosts is None:
        if args.launcher is not None:
            raise UsageError(f"argument --launcher: goes with --hosts, got {args.launcher!r} without")
        return None
    if launch.inside_mpirun():
        if not launch.started_by_us():
            raise UsageError(f"argument --hosts: {inside}")
        return None
    launcher = "ssh" if args.launcher is None else args.launcher
    with blaming("argument --launcher"):
        check_launcher(launcher)
    with blaming("argument --hosts"):
        return Destinations(tuple(name.strip() for name in args.hosts.split(",")), launcher)


def check_run_on(hosts: Destinations, config: MoEConfig, args: argparse.Namespace) -> None:
    """That `flashmoe run` can start its ranks there; each host finds out for itself whether it has the memory."""
    if args.backend != "cpu":
        raise UsageError(f"argument --hosts: goes with --backend cpu, got {args.backend}")
    if config.num_ranks % len(hosts.names):
        rule = f"must be a multiple of the {len(hosts.names)} hosts, which get as many ranks each"
        raise UsageError(f"argument --ranks: {rule}; got {config.num_ranks}")
    check_clocks(args)
    require_answers(hosts)


def require_answers(hosts: Destinations) -> None:
    """That the launcher is here, and that the hosts answer, if they can be asked; else a UsageError that says why."""
    with blaming("argument --launcher"):
        find_starter(hosts.launcher)
    with blaming("argument --hosts"):
        hosts.ask()


def report_from(
    hosts: Destinations, num_ranks: int, args: argparse.Namespace, deadline_s: float
) -> tuple[int, dict[str, Any] | None]:
    """(the exit status of this command as ranks on hosts, what rank 0 found), as it gives it by `--json -`.

    So all that is written is written here, where the command was given. None, if it found nothing; what it said
    instead is passed on.
    """
    command, said = [sys.executable, "-Pm", "flashmoe_numba", *args.argv, "--json", "-"], bytearray()
    code = launch.start(num_ranks, command, deadline_s, hosts, said.extend)
    try:
        return code, json.loads(said)
    except ValueError:
        sys.stdout.write(said.decode(errors="replace"))
        return code, None


def check_clocks(args: argparse.Namespace) -> None:
    """That no picture is wanted of ranks on several machines."""
    for flag in ("trace", "plot"):
        if getattr(args, flag):
            raise UsageError(f"argument --{flag}: goes with ranks of one machine: clocks of several do not agree")


def between(world: LocalRanks | MpiRanks) -> dict[str, Any]:
    """What settings say of the machines."""
    if len(world.machines) == 1:
        return {}
    from mpi4py import MPI

    from ..processes.netmod import netmod

    return {"hosts": len(world.machines), "netmod": netmod(MPI).name}
