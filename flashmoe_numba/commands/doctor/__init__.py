"""What this machine can run and why not, each with the fix. The exit status is 0 if it can run layers on its CPUs.

A line begins with ok, with warn where something else will have to do, or with no. With --hosts instead what is between
these: how long a small message takes, and how much goes through; --machine-file FILE.toml makes that the [network] of a
machine for `flashmoe sim`, for instance one that `flashmoe calibrate` wrote on one of them.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from ...processes.cores import count_cores
from ..hosts import add_hosts_arguments, hosts_from
from ..outputs import add_json_argument, check_outputs, give

MEANING = {
    "cpu": "layers on CPUs, ranks as threads",
    "mpi": "layers on CPUs, ranks as processes under mpirun",
    "compile": "building for GPUs: flashmoe compile",
    "cuda": "layers on GPUs",
    "nvshmem": "layers on GPUs of several hosts",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json_argument(parser)
    add_hosts_arguments(parser, parser.add_argument, "measure what is between these hosts")
    machine = "with --hosts: a machine of sim that gets these hosts as nodes, and what was measured as [network]"
    parser.add_argument("--machine-file", metavar="FILE", help=machine)


def main(args: argparse.Namespace) -> int:
    """Look at everything, and say it."""
    if args.hosts is not None or args.machine_file is not None:
        from .hosts import examine_hosts

        return examine_hosts(args)
    hosts_from(args)  # --launcher goes with --hosts
    check_outputs({"--json": args.json})
    report = examine()
    give(args.json, lines(report), report)
    return 0 if report["can_run"]["cpu"] else 1


def examine() -> dict[str, Any]:
    """The JSON object."""
    from ...gpu.driver import ask_driver
    from .gpus import check_gpus
    from .host import USES, can_run, check_host
    from .nvshmem import check_nvshmem

    driver = ask_driver()
    checks = [*check_host(), *check_gpus(driver), *check_nvshmem()]
    return {
        "machine": f"{platform.platform()}, {count_cores()} cores",
        "can_run": {use: can_run(checks, use) for use in USES},
        "checks": [asdict(check) for check in checks],
        "driver": asdict(driver),
    }


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The table that people read."""
    yield report["machine"]
    yield ""
    for check in report["checks"]:
        fix = f"; fix: {check['fix']}" if check["fix"] else ""
        yield f"{check['status']:6}{check['name']:16}{check['found']}{fix}"
    yield from _peers(report["driver"]["peers"])
    yield ""
    for use, possible in report["can_run"].items():
        yield f"{'ok' if possible else 'no':6}{use:16}{MEANING[use]}"


def _peers(peers: tuple[tuple[bool, ...], ...]) -> Iterator[str]:
    """The matrix: which GPU (row) can read and write the memory of which (column)."""
    if len(peers) > 1:
        yield _aligned("peer access", range(len(peers)))
        for i, row in enumerate(peers):
            yield _aligned(f"  from GPU {i} to", ["ok" if reached else "no" for reached in row])


def _aligned(name: str, cells: Iterable[Any]) -> str:
    return f"{'':6}{name:16}" + "".join(f"{cell:>4}" for cell in cells)
