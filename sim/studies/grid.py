"""What a sweep runs: all combinations of the values of a TOML file.

    schema = 1
    [grid]
    policy = ["flashmoe"]
    hardware = ["8xH100"]
    preset = ["flashmoe-paper"]
    tokens = [1024, 4096]
    [knobs]
    flashmoe = [{}, {ladder = true}]

`policy`, `hardware` and `preset` must be there; sizes that are not are the preset's, the others those of `DEFAULTS`.
All GPUs of the hardware are ranks. "none" is None, of what can be that. `[knobs]` has a list of sets for a policy; a
policy without one runs with its defaults. Equal combinations are run once. Leaves out: sizes that depend on each other,
for which there are several files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from reference import MoEConfig, load_preset
from reference.config import expert_capacity
from reference.scalars import check_one_of

from ..drafting.knobs import PolicyKnobs
from ..policies import TERMS, make_knobs, row_tile
from ..policies.outside import is_file
from ..world.checks import check_keys, naming
from ..world.hardware import load_hardware
from ..world.machine_names import hardware_file
from ..world.precision import precision
from ..world.recorded import is_recorded, recorded_path
from ..world.rounding import WAYS
from ..world.routing import make_routing
from ..world.scenario import Scenario
from ..world.world import FORWARD, PASSES, World

SCHEMA = 1
WANTED = ("policy", "hardware", "preset")
SIZES = {"tokens": "num_tokens", "experts": "num_experts", "topk": "num_topk", "hidden": "hidden", "ffn": "ffn"}
DEFAULTS: dict[str, Any] = {"routing": "uniform", "capacity_factor": None, "precision": "bfloat16", "seed": 0}
LATER: dict[str, Any] = {"seeds": 1, "layer": None, "replicas": None, "rounding": None, "terms": "system"}
LATER |= {"passes": FORWARD}
LEAST = {"seed": 0, "layer": 0, "replicas": 0}  # of integers; of all others 1
ONE_TOKEN = MoEConfig(num_ranks=1, num_tokens=1, hidden=1, ffn=1, num_experts=1, num_topk=1)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One simulation's parameters, all as numbers and names that a file can hold.

    Args:
        tokens: of each rank.
        capacity_factor: the most rows from one source to one expert are this many times
            `ceil(tokens / experts) * topk`; None: nothing is dropped, whatever the preset says.
        seed, seeds: of the routing; of several from `seed` on, the row is that of the median, with the spread.
        layer: of a recorded routing.
        replicas: copies of busy experts, all placed by load; None: experts in blocks.
        rounding: of each expert's rows to the policy's row tile, one of `rounding.WAYS`.
        terms: one of `policies.TERMS`.
        passes: one of `world.PASSES`.
        knobs: those that differ from the policy's defaults on these terms.

    What came later than the first files (`LATER`) is part of the key only where it is not as it was.
    """

    policy: str
    hardware: str
    preset: str
    tokens: int
    experts: int
    topk: int
    hidden: int
    ffn: int
    gated: bool
    routing: str
    capacity_factor: float | None
    precision: str
    seed: int
    seeds: int
    layer: int | None
    replicas: int | None
    rounding: str | None
    terms: str
    passes: str
    knobs: dict[str, Any] = field(hash=False)

    @cached_property
    def key(self) -> str:
        """The same for the same parameters, on every machine; those that are files count by what they hold."""
        told = {name: value for name, value in asdict(self).items() if name not in LATER or value != LATER[name]}
        text = json.dumps(told, sort_keys=True).encode()
        return hashlib.sha256(text + b"".join(map(_digest, self._files()))).hexdigest()[:16]

    def _files(self) -> list[Path]:
        """The files that parameters name, where they are there."""
        machine = hardware_file(self.hardware)
        named = [Path(self.policy)] if is_file(self.policy) else []
        named += [recorded_path(self.routing)] if is_recorded(self.routing) else []
        named += [machine] if machine else []
        return [path for path in named if path.is_file()]

    def row(self) -> dict[str, Any]:
        """What a line of a sweep's file begins with."""
        return {"key": self.key, "ranks": load_hardware(self.hardware).num_gpus, **asdict(self)}

    def policy_knobs(self) -> PolicyKnobs:
        """All knobs of the policy."""
        return make_knobs(self.policy, self.knobs, self.terms)

    def world(self, seed: int | None = None) -> World:
        """Where the policy runs, with this seed or its own.

        Raises:
            ValueError: an impossible combination.
        """
        hardware = load_hardware(self.hardware)
        sizes = {name: getattr(self, axis) for axis, name in SIZES.items()}
        config = load_preset(self.preset, num_ranks=hardware.num_gpus, gated=self.gated, capacity=None, **sizes)
        if self.capacity_factor is not None:
            config = replace(config, capacity=expert_capacity(config, self.capacity_factor))
        scenario = Scenario(
            config=config,
            hardware=hardware,
            precision=self.precision,
            routing=self.routing,
            seed=self.seed if seed is None else seed,
            layer=self.layer,
            round_to=row_tile(self.policy, self.policy_knobs()) if self.rounding else None,
            round_how=self.rounding or "nearest",
            replicas=self.replicas,
            passes=self.passes,
        )
        return scenario.make()


def _digest(path: Path) -> bytes:
    """Of what a file holds, read again only if it was written since."""
    state = path.stat()
    return _digest_of(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _digest_of(path: Path, *_: int) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


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


def _check_file(file: dict[str, Any]) -> tuple[dict[str, list[Any]], dict[str, list[dict[str, Any]]]]:
    if file.get("schema") != SCHEMA:
        raise ValueError(f"schema must be {SCHEMA}, got {file.get('schema', 'none')!r}")
    check_keys("the file", file, (), ("schema", "grid", "knobs"))
    axes, knobs = file.get("grid", {}), file.get("knobs", {})
    check_keys("[grid]", axes, WANTED, [name for name in AXES if name not in WANTED])
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
