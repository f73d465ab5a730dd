"""Machines by name and from files, and the files of machines.

Presets are TOML files in presets/, one per GPU kind; a machine is named by it: "8xH100" is one node, "2x8xH100" two. A
file of the user's own has the same schema, and "2xmy.toml" is two of its nodes, "2x4xmy.toml" two of 4 GPUs. Optional
keys: `chip`, [gpu] `clock_ghz`, [node] `link` and `gpus_per_link`, [network] `link`, `gpus_per_nic` and `core_gbps`;
see `Hardware`.
"""

from __future__ import annotations

import json
import tomllib
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from .checks import naming
from .hardware import Hardware
from .machine_names import FOLDER, GOOD_NAMES, gpu_kind, hardware_file, parse_file_name, parse_name
from .machine_schema import OPTIONAL, SCHEMA, TABLES, check_file


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


# ---- tables ----


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
