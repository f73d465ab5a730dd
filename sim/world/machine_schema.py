"""What a machine's file must have and may have: tables and keys; `hardware.py` says what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .checks import check_positive, check_text

SCHEMA = 1
MMA_TYPES = ("float64", "float32", "float16", "bfloat16", "fp8", "fp4")  # float32 is tf32 on tensor cores
TABLES: dict[str, tuple[str, ...]] = {  # the tables of a file and their values; [gpu.tflops] comes on top
    "gpu": ("sms", "hbm_gbps", "hbm_achieved", "hbm_gb", "l2_mb", "l2_gbps"),
    "node": ("nvlink_gbps", "nvlink_latency_ns", "sm_write_gbps", "sm_read_gbps", "flag_ns", "barrier_ns"),
    "network": ("nic_gbps", "nic_latency_ns"),
    "host": ("launch_ns", "graph_launch_ns", "host_sync_ns"),
}
OPTIONAL = {  # (table, key) of a file: the field of `Hardware`, whose default counts where it is not given
    ("gpu", "clock_ghz"): "clock_ghz",
    ("node", "link"): "node_link",
    ("node", "gpus_per_link"): "gpus_per_link",
    ("network", "link"): "network_link",
    ("network", "gpus_per_nic"): "gpus_per_nic",
    ("network", "core_gbps"): "core_gbps",
}
SOURCED = ("clock_ghz", "core_gbps")  # of these, those whose source a file must have if it has them
VALUES = tuple(name for names in TABLES.values() for name in names)


def check_file(file: dict[str, Any]) -> None:
    """That a file has all keys, no others, and good counts.

    Raises:
        TypeError, ValueError: naming what is wrong, all missing and unknown keys at once.
    """
    if file.get("schema") != SCHEMA or isinstance(file["schema"], bool):
        raise ValueError(f"schema must be {SCHEMA}, got {file.get('schema', 'none')!r}")
    _check_names(file)
    check_text("description", file["description"])
    node = file["node"]
    counts = {"nodes": file.get("nodes", 1), "gpus": node["gpus"], "max_gpus": node.get("max_gpus", node["gpus"])}
    for name, value in counts.items():
        check_positive(name, value, whole=True)
    if node["gpus"] > counts["max_gpus"]:
        raise ValueError(f"gpus must be in [1, max_gpus={node['max_gpus']}], got {node['gpus']}")


def _check_names(file: dict[str, Any]) -> None:
    """All keys that lack and all that are not known, of all tables, in one message."""
    missing, unknown = [], []
    for table, (required, optional) in _schema(file).items():
        given = _table(file, table)
        where = f"[{table}] " if table else ""
        missing += [where + name for name in required if name not in given]
        may = f" (it may have {', '.join(optional)})" if optional else ""
        unknown += [f"{where}{name}{may}" for name in given if name not in (*required, *optional)]
    told = [f"{what}: {', '.join(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
    if told:
        raise ValueError("; ".join(told))


def _table(file: dict[str, Any], name: str) -> Mapping[str, Any]:
    """A table by its path, empty where there is none; the file itself is ""."""
    table: Any = file
    parts = name.split(".") if name else []
    for depth, part in enumerate(parts, start=1):
        table = table.get(part, {})
        if not isinstance(table, Mapping):
            raise TypeError(f"[{'.'.join(parts[:depth])}] must be a table, got {table!r}")
    found: Mapping[str, Any] = table
    return found


def _schema(file: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Of each table the keys that it must have and those that it may have; the file itself is ""."""
    beside = {"gpu": ("tflops",), "node": ("gpus",)}
    optional = {table: tuple(key for of, key in OPTIONAL if of == table) for table in TABLES}
    optional["node"] += ("max_gpus",)
    tables = {table: ((*names, *beside.get(table, ())), optional[table]) for table, names in TABLES.items()}
    whole = {"": (("schema", "name", "description"), ("nodes", "chip", *TABLES, "sources"))}
    more = tuple(f"tflops.{name}" for name in _table(file, "gpu.tflops") if name in MMA_TYPES)
    more += tuple(key for table, key in OPTIONAL if key in SOURCED and key in _table(file, table))
    return whole | tables | {"gpu.tflops": ((), MMA_TYPES), "sources": ((*VALUES, *more), ())}
