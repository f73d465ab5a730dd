"""The machine that is simulated: one GPU kind, how many there are, and what joins them.

A `Hardware` is a frozen value without I/O, checked when it is made. Presets are TOML files in presets/, one per GPU
kind; a machine is named by it: "8xH100" is one node, "2x8xH100" two. A file of the user's own has the same schema, and
"2xmy.toml" is two of its nodes, "2x4xmy.toml" two of 4 GPUs. Optional keys: `chip`, [node] `link` and `gpus_per_link`,
[network] `link` and `gpus_per_nic`; see `Hardware`.
Rates are GB/s (1e9 bytes), one direction, per GPU, or per link where GPUs share one; times are integer nanoseconds.
Every value says where it is from: a text that starts with "assumption:" is a guess with its reason, and no measurement
stands behind it.

Leaves out: several NICs per GPU, congestion in switches, clocks that fall under load; what a path crosses beside one
link at each end, such as a NIC and the root port behind it: take the narrower one, and as many GPUs as go through it.
Source: data/hardware.csv, data/nccl_nvshmem.csv and vendors' datasheets, as each file says.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from reference.scalars import make_plain, plain

from .checks import check_keys, check_positive, check_text, naming
from .machine_names import FOLDER, GOOD_NAMES, gpu_kind, hardware_file, parse_file_name, parse_name
from .machine_names import hardware_names as hardware_names
from .machine_schema import MMA_TYPES, OPTIONAL, SCHEMA, SOURCED, TABLES, VALUES, check_file

COUNTS = ("num_nodes", "gpus_per_node", "gpus_per_link", "gpus_per_nic")
LEAST_RATE, MOST_WHOLE = 1e-6, 10**9  # so that times of whatever fits a GPU's memory fit 64 bits


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One machine. Change a value with `dataclasses.replace`, its text in `sources` with it.

    Args:
        name: what reports show beside simulated numbers.
        num_nodes, gpus_per_node: the GPUs of a node form one NVLink domain; nodes are joined by NICs.
        chip: the GPU kind whose fitted rates count (`drafting/rates.py`), by default the name without its numbers:
            a machine whose name or values are changed keeps it.
        node_link, network_link: what reports and traces call the links within a node and between nodes. Of one name
            they are one link, such as a root port with GPUs and a NIC behind it, and must be alike.
        gpus_per_link, gpus_per_nic: GPUs of a node that go through one link out and one in, such as a root port, and
            share its bandwidth; those beside each other share. Two of them that talk to each other use it as well.
        sms: streaming multiprocessors of a GPU.
        hbm_gbps, hbm_achieved: the datasheet's bandwidth, and the share in (0, 1] of it that streaming reaches.
        hbm_gb, l2_mb, l2_gbps: memory, second-level cache, and what all SMs together read from that cache.
        tflops: dense peak by MMA type, keys from `MMA_TYPES`; what the GPU cannot do is left out.
        clock_ghz: of its multiprocessors while they multiply; None if unknown. What is known of one GPU is taken for
            another by it (`drafting/rates.py`).
        nvlink_gbps, nvlink_latency_ns: of one link, achieved to all peers together; a small one-sided put.
        sm_write_gbps, sm_read_gbps: the most that one SM stores to peers and loads from them.
        nic_gbps, nic_latency_ns: of one NIC, achieved between nodes; a small put.
        flag_ns: from the store of a signal until a spinning reader on a peer has seen it.
        barrier_ns: a barrier over the GPUs of a node inside a kernel.
        launch_ns, graph_launch_ns: the host submits one kernel; the gap between two nodes of a CUDA graph.
        host_sync_ns: the host reads a value back, for instance the token counts.
        sources: where each value is from: one text per name in `VALUES` and per "tflops.<mma_type>".

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """

    name: str
    num_nodes: int
    gpus_per_node: int
    sms: int
    hbm_gbps: float
    hbm_achieved: float
    hbm_gb: float
    l2_mb: float
    l2_gbps: float
    tflops: Mapping[str, float] = field(hash=False)
    nvlink_gbps: float
    nvlink_latency_ns: int
    sm_write_gbps: float
    sm_read_gbps: float
    nic_gbps: float
    nic_latency_ns: int
    flag_ns: int
    launch_ns: int
    graph_launch_ns: int
    host_sync_ns: int
    barrier_ns: int
    sources: Mapping[str, str] = field(hash=False)
    chip: str = ""
    node_link: str = "NVLink"
    network_link: str = "NIC"
    gpus_per_link: int = 1
    gpus_per_nic: int = 1
    clock_ghz: float | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        if isinstance(self.tflops, Mapping):
            object.__setattr__(self, "tflops", {key: plain(value) for key, value in self.tflops.items()})
        check_text("name", self.name)
        if self.chip == "":
            object.__setattr__(self, "chip", gpu_kind(self.name))
        for name in (*COUNTS, *VALUES):
            whole = name in COUNTS or name == "sms" or name.endswith("_ns")
            _check_value(name, getattr(self, name), whole)
        if self.hbm_achieved > 1:
            raise ValueError(f"hbm_achieved must be a share in (0, 1], got {self.hbm_achieved}")
        if self.clock_ghz is not None:
            _check_value("clock_ghz", self.clock_ghz)
        self._check_links()
        self._check_tflops()
        self._check_sources()

    def _check_links(self) -> None:
        for name in ("chip", "node_link", "network_link"):
            check_text(name, getattr(self, name))
        pairs = {"nic_gbps": "nvlink_gbps", "gpus_per_nic": "gpus_per_link"} if self.is_one_link else {}
        for name, other in pairs.items():
            mine, its = getattr(self, name), getattr(self, other)
            if mine != its:
                why = f"as network_link and node_link are one, {self.node_link!r}"
                raise ValueError(f"{name} must be {other}={its}, {why}; got {mine}")
        for name in ("gpus_per_link", "gpus_per_nic"):
            if self.gpus_per_node % getattr(self, name):
                raise ValueError(f"{name} must divide gpus_per_node={self.gpus_per_node}, got {getattr(self, name)}")

    def _check_tflops(self) -> None:
        if not isinstance(self.tflops, Mapping):
            raise TypeError(f"tflops must be a mapping from MMA types to TFLOPS, got {self.tflops!r}")
        if not self.tflops:
            raise ValueError(f"tflops must have at least one of {', '.join(MMA_TYPES)}, got none")
        for mma_type, value in self.tflops.items():
            if mma_type not in MMA_TYPES:
                raise ValueError(f"tflops must have keys from {', '.join(MMA_TYPES)}; got {mma_type!r}")
            _check_value(f"tflops.{mma_type}", value)

    def _check_sources(self) -> None:
        if not isinstance(self.sources, Mapping):
            raise TypeError(f"sources must be a mapping from value to text, got {self.sources!r}")
        known = [name for name in SOURCED if getattr(self, name) is not None]
        check_keys("sources", self.sources, (*VALUES, *known, *(f"tflops.{mma_type}" for mma_type in self.tflops)))
        for name, text in self.sources.items():
            check_text(f"sources of {name}", text)

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def is_one_link(self) -> bool:
        """Whether what leaves a node goes through the same links as what stays in it."""
        return self.node_link == self.network_link

    @property
    def nvlink_share_gbps(self) -> float:
        """What a GPU has of its link within the node when all use theirs."""
        return self.nvlink_gbps / self.gpus_per_link

    @property
    def nic_share_gbps(self) -> float:
        """What a GPU has of its NIC when all use theirs."""
        return self.nic_gbps / self.gpus_per_nic


def load_hardware(name_or_path: str) -> Hardware:
    """A machine by name, or by the path of a file that ends in .toml.

    "H100" is the kind's usual node, "8xH100" one node of 8 GPUs, "2x8xH100" two of them; case does not matter.
    "my.toml" is the machine of a file, "2xmy.toml" two nodes of it, "2x4xmy.toml" two nodes of 4 GPUs.

    Raises:
        TypeError: not a string; ValueError: no such kind, too many GPUs for one NVLink domain, or the file breaks
            the schema (file, key and rule); FileNotFoundError: no such file.
    """
    if not isinstance(name_or_path, str):
        raise TypeError(f"hardware must be a name or the path of a .toml file, got {name_or_path!r}")
    if hardware_file(name_or_path) is not None:
        nodes, gpus, path = parse_file_name(name_or_path)
    else:
        nodes, gpus, kind = parse_name(name_or_path)
        path = FOLDER / f"{kind}.toml"
    file = _read(path)
    if nodes is None:
        return _build(path, file, file["node"]["gpus"])
    most = file["node"].get("max_gpus", file["node"]["gpus"])
    gpus = file["node"]["gpus"] if gpus is None else gpus
    kind = gpu_kind(file["name"])
    if not 1 <= gpus <= most or nodes < 1:
        rule = f"{kind} has at least one node and 1 to {most} GPUs in a node (one NVLink domain)"
        good = f'"2x{path}", "2x{most}x{path}"' if path.parent != FOLDER else f'"{most}x{kind}", "2x{most}x{kind}"'
        raise ValueError(f"hardware {name_or_path!r}: {rule}; good names: {good}")
    name = f"{gpus}x{kind}" if nodes == 1 else f"{nodes}x{gpus}x{kind}"
    return _build(path, file | {"name": name, "nodes": nodes}, gpus)


def to_toml(hardware: Hardware) -> str:
    """The text of a file that `load_hardware` reads back to an equal `Hardware`."""
    counts = f"nodes = {hardware.num_nodes}\n\n"
    about = f"{hardware.num_nodes} x {hardware.gpus_per_node} GPUs, values and sources as in {hardware.name}"
    chip = f"chip = {_quote(hardware.chip)}\n"
    lines = [f"schema = {SCHEMA}\nname = {_quote(hardware.name)}\ndescription = {_quote(about)}\n{chip}{counts}"]
    for table, names in TABLES.items():
        lines.append(f"[{table}]\n")
        lines.extend([f"gpus = {hardware.gpus_per_node}\n"] if table == "node" else [])
        lines.extend(f"{name} = {_number(getattr(hardware, name))}\n" for name in names)
        optional = {key: getattr(hardware, field) for (of, key), field in OPTIONAL.items() if of == table}
        given = {key: value for key, value in optional.items() if value is not None}
        lines.extend(f"{key} = {_quote(value) if key == 'link' else value}\n" for key, value in given.items())
    lines.append("\n[gpu.tflops]\n")
    lines.extend(f"{mma_type} = {_number(value)}\n" for mma_type, value in hardware.tflops.items())
    lines.append("\n[sources]\n")
    lines.extend(f"{_quote(name)} = {_quote(text)}\n" for name, text in hardware.sources.items())
    return "".join(lines)


# ---- files ----


def _read(path: Path) -> dict[str, Any]:
    """The tables of a file, with the right keys and counts; `Hardware` checks the values."""
    if not path.is_file():
        raise FileNotFoundError(f"hardware file {path}: no such file; good names without a file: {GOOD_NAMES}")
    try:
        file = deepcopy(_parse_toml(path.read_text(encoding="utf-8")))
    except ValueError as error:  # malformed TOML, or not UTF-8
        raise ValueError(f"hardware file {path}: not a TOML file: {error}") from None
    with naming(f"hardware file {path}"):
        check_file(file)
    return file


@lru_cache(maxsize=16)  # by the text: a sweep loads the same machine for every point
def _parse_toml(text: str) -> dict[str, Any]:
    return tomllib.loads(text)


def _build(path: Path, file: dict[str, Any], gpus: int) -> Hardware:
    values = {name: file[table][name] for table, names in TABLES.items() for name in names}
    about = {"name": file["name"], "num_nodes": file.get("nodes", 1), "gpus_per_node": gpus}
    about |= {"chip": file["chip"]} if "chip" in file else {}
    about |= {field: file[table][key] for (table, key), field in OPTIONAL.items() if key in file[table]}
    with naming(f"hardware file {path}"):
        return Hardware(**about, **values, tflops=file["gpu"]["tflops"], sources=file["sources"])


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else repr(float(value))


def _quote(text: str) -> str:
    """A TOML basic string: JSON's, except that TOML also escapes DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


# ---- rules ----


def _check_value(name: str, value: float, whole: bool = False) -> None:
    check_positive(name, value, whole)
    if not whole and value < LEAST_RATE:
        raise ValueError(f"{name} must be at least {LEAST_RATE:g}, got {value}")
    if whole and value > MOST_WHOLE:
        raise ValueError(f"{name} must be at most {MOST_WHOLE}, got {value}")
