"""What was measured between hosts, as the network of a machine for `flashmoe sim`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import sim
from sim.world.machine_files import to_toml

from ..errors import UsageError
from .flags import blaming


def load_machine(file: str) -> sim.Hardware:
    """The machine of `--machine-file`."""
    if not file.endswith(".toml"):
        raise UsageError(f"argument --machine-file: must end in .toml, got {file!r}")
    with blaming("argument --machine-file"):
        return sim.load_hardware(file)


def write_network(file: str, report: dict[str, Any]) -> None:
    """Give a machine's file these hosts as nodes, whose ranks share a NIC each, and medians over links as network.

    What a core carries counts where cores do: GPUs' NICs read memory by themselves.
    """
    before, links, num_hosts = load_machine(file), report["links"], len(report["hosts"])
    date = datetime.now(UTC).date().isoformat()
    source = (
        f"measured {date} by flashmoe doctor --hosts between {num_hosts} hosts, {report['netmod']}, median of links"
    )
    ranks, sources = before.gpus_per_node, {"nic_gbps": source, "nic_latency_ns": f"half of a round trip; {source}"}
    if before.core_gbps is not None:
        sources["core_gbps"] = f"bytes over the time of carriers at both ends; {source}"
    after = replace(
        before,
        name=_name(before, num_hosts),
        num_nodes=num_hosts,
        nic_gbps=float(f"{median(link['gbps'] for link in links):.4g}"),
        nic_latency_ns=max(1, round(median(link["latency_ns"] for link in links))),
        gpus_per_nic=ranks,
        core_gbps=None if before.core_gbps is None else float(f"{report['core_gbps']:.4g}"),
        sources={**before.sources, **sources},
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
