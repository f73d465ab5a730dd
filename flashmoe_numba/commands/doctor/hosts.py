"""`flashmoe doctor --hosts`: a rank on each, which measure what is between them."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import sim
from sim.world.hardware import to_toml

from ...errors import UsageError
from ...processes import launch
from ..flags import blaming
from ..hosts import hosts_from, started_on
from ..outputs import check_outputs, give
from .host import OK, WARN

if TYPE_CHECKING:
    from ...processes.together import MpiRanks

DEADLINE_S = 60.0


def examine_hosts(args: argparse.Namespace) -> int:
    """The exit status: 0 if messages went everywhere."""
    if args.hosts is None:
        raise UsageError(f"argument --machine-file: goes with --hosts, got {args.machine_file} without")
    hosts = hosts_from(args)
    if hosts is None:
        return _measure_as_rank(args)
    if len(hosts.names) < 2:
        raise UsageError(f"argument --hosts: needs two hosts or more to measure between them, got {hosts.names[0]}")
    check_outputs({"--json": args.json})
    if args.machine_file is not None:
        _load(args.machine_file)
    return started_on(hosts, len(hosts.names), args, DEADLINE_S)


def _load(file: str) -> sim.Hardware:
    if not file.endswith(".toml"):
        raise UsageError(f"argument --machine-file: must end in .toml, got {file!r}")
    with blaming("argument --machine-file"):
        return sim.load_hardware(file)


def _measure_as_rank(args: argparse.Namespace) -> int:
    launch.guard_this_rank(DEADLINE_S)
    from ...processes.together import MpiRanks

    world = MpiRanks(DEADLINE_S)
    try:
        if len(world.machines) < 2:
            raise UsageError(f"argument --hosts: all ranks are on one machine, {platform.node()}")
        report = _measure(world)
        return world.agree(_give(args, report) if world.rank_idx == 0 else 0)
    except UsageError:
        raise  # all ranks have it
    except BaseException as error:
        world.abandon(error)


def _measure(world: MpiRanks) -> dict[str, Any]:
    """The JSON object, on rank 0."""
    from mpi4py import MPI

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
    }


def _give(args: argparse.Namespace, report: dict[str, Any]) -> int:
    if args.machine_file is not None:
        write_network(args.machine_file, report)
    give(args.json, lines(report, args.machine_file), report)
    return 0


def lines(report: dict[str, Any], file: str | None) -> Iterator[str]:
    """The table that people read."""
    status = OK if report["survives_a_lost_rank"] else WARN
    outlives = "outlives a lost rank" if status == OK else f"may not outlive a lost rank; fix: {report['fix']}"
    yield f"{status:6}{'MPI uses':16}{report['netmod']}, {outlives}"
    yield f"{OK:6}{'threads':16}may call it"
    hosts = report["hosts"]
    for link in report["links"]:
        name = f"{hosts[link['source']]} to {hosts[link['target']]}"
        yield f"{OK:6}{name:24}{link['latency_ns'] / 1e3:8.1f} us  {link['gbps']:8.3f} GB/s"
    if file is not None:
        yield f"\nsimulate on them with\nflashmoe sim --hardware {file}"


def write_network(file: str, report: dict[str, Any]) -> None:
    """Give a machine's file these hosts as nodes, whose ranks share a NIC each, and medians over links as network."""
    before, links, num_hosts = _load(file), report["links"], len(report["hosts"])
    date = datetime.now(UTC).date().isoformat()
    source = (
        f"measured {date} by flashmoe doctor --hosts between {num_hosts} hosts, {report['netmod']}, median of links"
    )
    ranks = before.gpus_per_node
    after = replace(
        before,
        name=_name(before, num_hosts),
        num_nodes=num_hosts,
        nic_gbps=float(f"{median(link['gbps'] for link in links):.4g}"),
        nic_latency_ns=max(1, round(median(link["latency_ns"] for link in links))),
        gpus_per_nic=ranks,
        sources={**before.sources, "nic_gbps": source, "nic_latency_ns": f"half of a round trip; {source}"},
    )
    comments = _comments(Path(file).read_text(encoding="utf-8").splitlines())
    Path(file).write_text("".join(f"{line}\n" for line in comments) + to_toml(after), encoding="utf-8")


def _name(before: sim.Hardware, num_hosts: int) -> str:
    """Of a machine that may have been given hosts already."""
    return f"{num_hosts} x {before.name.removeprefix(f'{before.num_nodes} x ')}"


def _comments(text: Sequence[str]) -> Iterator[str]:
    """Those at the head of a file, where `flashmoe calibrate` says with which flags it is to be simulated."""
    for line in text:
        if not line.startswith("#"):
            return
        yield line
