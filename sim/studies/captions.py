"""The words of figures of a sweep: their titles, their files' names, the order of what an axis shows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .point import LATER
from .sweep import Row

WORDS = {
    "experts": "{} experts",
    "experts_per_gpu": "{:g} experts per GPU",
    "topk": "top-{}",
    "tokens": "{:,} tokens per GPU",
    "routing": "routing {}",
}
WORDS |= {"hidden": "hidden {}", "ffn": "ffn {}", "capacity_factor": "capacity factor {}"}
WORDS |= {
    "capacity": "at most {} rows from a rank to an expert",
    "layer": "layer {}",
    "replicas": "{} replicas",
    "rounding": "rows rounded ({})",
    "terms": "terms {}",
    "passes": "{}",
    "seeds": "median of {} seeds",
}
UNITS = {"tokens": "tokens per GPU", "experts": "experts over all GPUs", "gpus": "GPUs"}
SKEW = ("even", "uniform", "zipf", "text", "hot-rank", "hot")


def title(what: str, common: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """What is drawn, where, and what all its rows have in common."""
    where = common.get("hardware", f"{common['gpu']} GPUs" if "gpu" in common else None)
    parts = [str(common[name]) for name in ("preset", "precision") if name in common]
    said = {name: word for name, word in WORDS.items() if common.get(name) not in (None, LATER.get(name))}
    parts += [word.format(common[name]) for name, word in said.items()]
    parts += ["gated"] if common.get("gated") else []
    knobs = rows[0]["common_knobs"]
    parts += [f"all with {knobs}"] if knobs else []
    seeds = len({row["seed"] for row in rows})
    parts += [f"median of {seeds} seeds"] if seeds > 1 else []
    return f"{what}, simulated{f' on {where}' if where else ''}\n{', '.join(parts)}"


def in_file_name(name: str, value: object) -> str:
    """A parameter and its value."""
    if value is None and name in LATER:
        return f"no-{name}"
    prefix = {
        "experts": "E",
        "topk": "top",
        "tokens": "T",
        "capacity_factor": "capacity",
        "capacity": "most",
        "experts_per_gpu": "E-per-GPU",
        "gated": "gated-",
    }
    value = f"{value:g}" if isinstance(value, float) else value
    return re.sub(r"[^\w.-]+", "-", f"{prefix.get(name, name if isinstance(value, int) else '')}{value}")


def ordered(rows: Sequence[Row], name: str) -> list[Any]:
    """The values of a parameter in the order of an axis: routings by skew, machines by GPU and size."""
    first = {row[name]: row for row in rows}
    if name == "routing":
        kinds = {kind: place for place, kind in enumerate(SKEW)}
        return sorted(first, key=lambda value: (kinds.get(value.partition(":")[0], -1), len(value), value))
    if name == "hardware":
        return sorted(first, key=lambda value: (first[value]["gpu"], first[value]["gpus"], value))
    return sorted(first)
