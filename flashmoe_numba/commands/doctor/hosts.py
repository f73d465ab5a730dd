"""`flashmoe doctor --hosts`: a rank on each, which measure what is between them."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ...processes import launch
from ..hosts import hosts_from, report_from, require_answers
from ..network import load_machine, write_network
from ..outputs import check_outputs, give
from .host import OK, WARN

if TYPE_CHECKING:
    from ...processes.together import MpiRanks

DEADLINE_S = 60.0


def examine_hosts(args: argparse.Namespace) -> int:
    """The exit status: 0 if messages went everywhere."""
    if args.hosts is None:
        raise UsageError(f"argument --machine-file: goes with --hosts, got {args.machine_file} without")
    hosts = hosts_from(args, "flashmoe doctor starts a rank on each host itself: start this without mpirun")
    if hosts is None:
        return _measure_as_rank(args)
    if len(hosts.names) < 2:
        raise UsageError(f"argument --hosts: needs two hosts or more to measure between them, got {hosts.names[0]}")
    if args.machine_file is not None:
        load_machine(args.machine_file)
    require_answers(hosts)
    check_outputs({"--json": args.json})
    code, report = report_from(hosts, len(hosts.names), args, DEADLINE_S)
    if report is not None:
        give(args.json, lines(report), report)
        if args.machine_file is not None:
            _write_network(args, report)
    return code


def _write_network(args: argparse.Namespace, report: dict[str, Any]) -> None:
    write_network(args.machine_file, report)
    if args.json != "-":
        print(f"\nsimulate on them with\nflashmoe sim --hardware {args.machine_file}")


def _measure_as_rank(args: argparse.Namespace) -> int:
    launch.guard_this_rank(DEADLINE_S)
    from ...processes.together import MpiRanks

    world = MpiRanks(DEADLINE_S)
    try:
        if len(world.machines) < 2:
            raise UsageError(f"argument --hosts: all ranks are on one machine, {platform.node()}")
        report = _measure(world)
        if world.rank_idx == 0:
            give(args.json, lines(report), report)
        return world.agree(0)
    except UsageError:
        raise  # all ranks have it
    except BaseException as error:
        world.abandon(error)


def _measure(world: MpiRanks) -> dict[str, Any]:
    """The JSON object, on rank 0."""
    from mpi4py import MPI

    from ...bench.carrying import measure_carrying
    from ...processes.links import measure_links
    from ...processes.netmod import CURE, netmod

    found = netmod(MPI)
    names = [world.comm.bcast(platform.node(), first) for first in world.machines]
    links = measure_links(world.comm, world.machines)
    return {
        "netmod": found.name,
        "survives_a_lost_rank": found.survives,
        "fix": "" if found.survives else f"set {CURE}",
        "threads": MPI.Query_thread() == MPI.THREAD_MULTIPLE,
        "hosts": names,
        "links": [link._asdict() for link in links],
        "core_gbps": measure_carrying(world.comm),
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The table that people read."""
    status = OK if report["survives_a_lost_rank"] else WARN
    outlives = "outlives a lost rank" if status == OK else f"may not outlive a lost rank; fix: {report['fix']}"
    yield f"{status:6}{'MPI uses':16}{report['netmod']}, {outlives}"
    yield f"{OK:6}{'threads':16}may call it" if report["threads"] else f"{WARN:6}{'threads':16}may not call it"
    hosts = report["hosts"]
    for link in report["links"]:
        name = f"{hosts[link['source']]} to {hosts[link['target']]}"
        yield f"{OK:6}{name:24}{link['latency_ns'] / 1e3:8.1f} us  {link['gbps']:8.3f} GB/s"
    yield f"{OK:6}{'a core carries':24}{report['core_gbps']:23.3f} GB/s, where the time of both ends counts"
