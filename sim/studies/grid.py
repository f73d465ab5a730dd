"""What a sweep runs: all combinations of the values of a TOML file.

    schema = 1
    [grid]
    policy = ["flashmoe"]
    hardware = ["8xH100"]
    preset = ["flashmoe-paper"]
    tokens = [1024, 4096]
    [knobs]
    flashmoe = [{}, {ladder = true}]

`policy`, `hardware` and `preset` must be there; sizes that are not are the preset's, the others those of `DEFAULTS` and
`LATER` (`point.py`). All GPUs of the hardware are ranks. "none" is None, of what can be that. `[knobs]` has a list of
sets for a policy; a policy without one runs with its defaults. Equal combinations are run once. Leaves out: sizes that
depend on each other, for which there are several files.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

from reference import MoEConfig, load_preset
from reference.scalars import check_one_of

from ..policies import TERMS, make_knobs
from ..world.checks import check_keys, naming
from ..world.machine_files import load_hardware
from ..world.precision import precision
from ..world.recorded import is_recorded, recorded_path
from ..world.rounding import WAYS
from ..world.routing import make_routing
from ..world.world import PASSES
from .point import DEFAULTS, LATER, SIZES, Point

SCHEMA = 1
WANTED = ("policy", "hardware", "preset")
MOST = 10**6  # combinations: a second for each is ten days
LIMITS = ("capacity", "capacity_factor")  # of which a grid has one
LEAST = {"seed": 0, "layer": 0, "replicas": 0}  # of integers; of all others 1
ONE_TOKEN = MoEConfig(num_ranks=1, num_tokens=1, hidden=1, ffn=1, num_experts=1, num_topk=1)
KINDS: dict[object, tuple[type, str]] = {  # of an axis, by its type in `Point`
    "str": (str, "texts"),
    "str | None": (str, "texts"),
    "int": (int, "integers"),
    "int | None": (int, 'integers, or "none"'),
    "bool": (bool, "true or false"),
    "float | None": (float, 'numbers, or "none"'),
}
AXES = {axis.name: KINDS[axis.type] for axis in fields(Point) if axis.name != "knobs"}
OPTIONAL = {axis.name for axis in fields(Point) if str(axis.type).endswith("None")}


def load_grid(path: Path) -> list[Point]:
    """All combinations of a file, each once.

    Raises:
        FileNotFoundError: no such file; ValueError: it breaks the schema; names file, key and rule.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        file = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    with naming(str(path)):
        axes, knobs = _check_file(file)
        _check_number(axes, knobs)
    points = {point.key: point for point in _points(axes, knobs)}
    return list(points.values())


def _points(axes: dict[str, list[Any]], knobs: dict[str, list[dict[str, Any]]]) -> Iterator[Point]:
    for values in itertools.product(*axes.values()):
        given = dict(zip(axes, values, strict=True))
        layer = load_preset(given["preset"])
        sizes = {axis: getattr(layer, name) for axis, name in SIZES.items()}
        for chosen in knobs.get(given["policy"], [{}]):
            yield Point(**(sizes | {"gated": layer.gated} | DEFAULTS | LATER | given), knobs=chosen)


# ---- rules


def _check_number(axes: dict[str, list[Any]], knobs: dict[str, list[dict[str, Any]]]) -> None:
    lines = sum(len(knobs.get(policy, [{}])) for policy in axes["policy"])
    number = lines * prod(len(values) for name, values in axes.items() if name != "policy")
    if number > MOST:
        raise ValueError(f"[grid] must have at most {MOST:,} combinations, got {number:,}")


def _check_file(file: dict[str, Any]) -> tuple[dict[str, list[Any]], dict[str, list[dict[str, Any]]]]:
    if file.get("schema") != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {file.get('schema', 'none')!r}")
    check_keys("the file", file, (), ("schema", "grid", "knobs"))
    axes, knobs = file.get("grid", {}), file.get("knobs", {})
    check_keys("[grid]", axes, WANTED, [name for name in AXES if name not in WANTED])
    if all(name in axes for name in LIMITS):
        raise ValueError(f"[grid] must have one of {' and '.join(LIMITS)}, which say the same limit; got both")
    if not isinstance(knobs, dict):
        raise TypeError(f"[knobs] must be a table, got {knobs!r}")
    checked = {name: _check_axis(name, values) for name, values in axes.items()}
    _check_knobs(knobs, axes["policy"])
    return checked, knobs


def _check_axis(name: str, values: object) -> list[Any]:
    kind, noun = AXES[name]
    if not isinstance(values, list) or not values:
        raise TypeError(f"[grid] {name} must be a list of {noun}, got {values!r}")
    if kind is float:
        values = [float(value) if type(value) is int else value for value in values]
    if name in OPTIONAL:
        values = [None if value == "none" else value for value in values]
    for value in values:
        if value is None:
            continue
        if type(value) is not kind:
            raise TypeError(f"[grid] {name} must be a list of {noun}, got {value!r} in it")
        _check_value(name, value)
    return values


def _check_value(name: str, value: Any) -> None:
    checks: dict[str, Callable[[Any], object]] = {
        "policy": lambda policy: make_knobs(policy, {}),
        "hardware": load_hardware,
        "preset": load_preset,
        "routing": _check_routing,
        "precision": precision,
        "rounding": lambda way: check_one_of("rounding", way, WAYS),
        "terms": lambda terms: check_one_of("terms", terms, TERMS),
        "passes": lambda passes: check_one_of("passes", passes, PASSES),
    }
    least = LEAST.get(name, 1)
    if name in checks:
        with naming(f"[grid] {name}"):
            checks[name](value)
    elif AXES[name][0] is int and value < least:
        raise ValueError(f"[grid] {name} must be at least {least}, got {value}")
    elif name == "capacity_factor" and not 0 < value < float("inf"):
        raise ValueError(f"[grid] {name} must be positive, got {value}")


def _check_routing(name: str) -> None:
    if not is_recorded(name):
        make_routing(name, ONE_TOKEN)
    elif not recorded_path(name).is_file():
        raise FileNotFoundError(f"no such recording: {name}")


def _check_knobs(knobs: dict[str, Any], policies: list[str]) -> None:
    for policy, sets in knobs.items():
        if policy not in policies:
            raise ValueError(f"[knobs] must be for policies of [grid], {', '.join(policies)}; got {policy}")
        if not isinstance(sets, list) or not sets or not all(isinstance(values, dict) for values in sets):
            raise TypeError(f"[knobs] {policy} must be a list of tables, got {sets!r}")
        for values in sets:
            with naming(f"[knobs] {policy}"):
                make_knobs(policy, values)
