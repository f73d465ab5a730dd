"""Is a table what a family's file may say? What can be told without a model's config."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from ..layer_kinds import ExpertKind, RouterKind

TEXTS = ("block", "outside", "quirks")
SECTIONS = ("sizes", "router", "experts", "shared", "state", "disk", "tested")
SIZES = ("hidden", "ffn", "num_experts", "num_topk", "num_zero", "zero")
_EXPERT = tuple(field.name for field in fields(ExpertKind))
# Of the sections whose keys are fields; the others' are checked where tensors are looked for.
_KEYS: Mapping[str, Collection[str]] = {
    "sizes": SIZES,
    "router": tuple(field.name for field in fields(RouterKind)),
    "experts": _EXPERT,
    "shared": ("ffn", "gate", *_EXPERT),
}


def check_table(table: Mapping[str, Any]) -> None:
    """Nothing, if it is a family's.

    Raises:
        ValueError: names the section, the key and the rule.
    """
    _check_keys("the file", table, ("model_type", *TEXTS, *SECTIONS))
    if "model_type" not in table:
        raise ValueError("must have a model_type, got none")
    for key in ("model_type", *TEXTS):
        if not isinstance(table.get(key, ""), str):
            raise ValueError(f"{key} must be a text, got {table[key]!r}")
    for name in SECTIONS:
        section = table.get(name, {})
        if not isinstance(section, dict):
            raise ValueError(f"[{name}] must be a table, got {section!r}")
        if name in _KEYS:
            _check_keys(f"[{name}]", section, (*_KEYS[name], "when"))
            _check_cases(name, section.get("when", []))


def _check_cases(name: str, cases: Any) -> None:
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise ValueError(f"[{name}] when must be a list of tables, got {cases!r}")
    for case in cases:
        whats = [case[key] for key, kind in (("set", dict), ("refuse", str)) if isinstance(case.get(key), kind)]
        if len(whats) != 1 or len({"set", "refuse"} & set(case)) != 1:
            raise ValueError(f"[{name}] when must have a table `set` or a text `refuse` in each case, got {case!r}")
        _check_keys(f"[{name}] when", case.get("set", {}), _KEYS[name])


def _check_keys(where: str, table: Mapping[str, Any], known: Collection[str]) -> None:
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; those known are {', '.join(known)}")
