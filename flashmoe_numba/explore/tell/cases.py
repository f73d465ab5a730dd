"""A failing run as a value: world, planted bug, late loads and schedule. It is kept as a small JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from reference import MoEConfig
from reference.scalars import is_whole

from ...seeing.trace import block_name
from ..choose.schedules import Choice
from ..plants import PLANTS
from ..run.network import channel_name
from ..run.program import Astray
from ..run.spec import OF_BACKWARDS, GivenCall, Lost, WorldSpec

KIND = "flashmoe explore case"
VERSION = 5
NAMED = (("lost", Lost), ("astray", Astray))
KEYS = ("file", "version", "report", "world", "plant", "late_seed", "schedule")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run, and what it should report.

    Args:
        late_seed: decides which loads of atomic words are late; None: none is.
        schedule: the choices that differ from the default order (schedules.py).
        report: as it is printed.
    """

    spec: WorldSpec
    plant: str | None
    late_seed: int | None
    schedule: tuple[Choice, ...]
    report: str


def save(case: Case, path: Path) -> None:
    """Write the file that `load` reads. Raises OSError if that cannot be done."""
    world = asdict(case.spec)
    parts = (KIND, VERSION, case.report, world, case.plant, case.late_seed, case.schedule)
    path.write_text(json.dumps(dict(zip(KEYS, parts, strict=True)), indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Case:
    """The case in a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what `save` writes; says why in one line.
    """
    try:
        parts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are not UTF-8
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(parts, dict) or parts.get("file") != KIND:
        raise ValueError(f"not a {KIND}")
    if parts.get("version") != VERSION:
        raise ValueError(f"version must be {VERSION}, got {parts.get('version')!r}")
    _check_keys("the file", parts, KEYS)
    spec = _spec(parts["world"])
    if parts["plant"] not in (None, *PLANTS):
        raise ValueError(f"plant must be one of flashmoe explore --list-plants, got {parts['plant']!r}")
    if parts["late_seed"] is not None:
        _check_integer("late_seed", parts["late_seed"], 0)
    schedule = _schedule(parts["schedule"], spec)
    return Case(
        spec=spec, plant=parts["plant"], late_seed=parts["late_seed"], schedule=schedule, report=str(parts["report"])
    )


def _spec(world: Any) -> WorldSpec:
    _check_keys("world", world, [field.name for field in fields(WorldSpec)])
    _check_keys("world.config", world["config"], [field.name for field in fields(MoEConfig)])
    for name, least in (("num_processors", 1), ("lanes", 1), ("epochs", 1), ("hosts", 1), ("data_seed", 0)):
        _check_integer(name, world[name], least)
    for name in ("grid", "ties", *OF_BACKWARDS):
        if not isinstance(world[name], bool):
            raise ValueError(f"{name} must be true or false, got {world[name]!r}")
    try:
        config = MoEConfig(**world["config"])
        for rank in world["leavers"]:
            _check_integer("leavers", rank, 0)
        for name in ("lost", "astray"):
            for part in [part for parts in world[name] for part in parts]:
                _check_integer(name, part, 0)
        for call in world["program"]:
            _check_integer("program", call, 0)
        if world["deadline"] is not None:
            _check_integer("deadline", world["deadline"], 1)
        given = tuple(GivenCall(tuple(call["counts"]), _tuples(call["experts"])) for call in world["given"])
        lost, astray = (tuple(kind(*parts) for parts in world[name]) for name, kind in NAMED)
        tuples = {name: _tuples(world[name]) for name in ("leavers", "program")}
        return WorldSpec(**world | tuples | {"config": config, "given": given, "lost": lost, "astray": astray})
    except (TypeError, KeyError) as error:
        raise ValueError(f"world: {error}") from None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _schedule(schedule: Any, spec: WorldSpec) -> tuple[Choice, ...]:
    known = _fibers(spec)
    for choice in schedule if isinstance(schedule, list) else [schedule]:
        if not isinstance(choice, list) or [type(part) for part in choice] != [str, int, str]:
            raise ValueError(f"schedule must be a list of [fiber, point, next fiber], got {choice!r}")
        if choice[0] not in known | {""} or choice[2] not in known:
            raise ValueError(f"schedule: this world has no such fibers: {choice!r}")
    return tuple(Choice(*choice) for choice in schedule)


def _fibers(spec: WorldSpec) -> set[str]:
    roles = [block_name(block, spec.num_processors) for block in range(spec.num_processors + 1)]
    blocks = [f"rank {rank_idx} {role}" for rank_idx in range(spec.config.num_ranks) for role in roles]
    lanes = [f" lane {lane}" for lane in range(spec.lanes)] if spec.lanes > 1 else [""]
    hosts = {f"rank {rank} host" for rank in spec.leavers}
    network = {channel_name(*pair) for pair in spec.pairs_apart}
    return {block + lane for block in blocks for lane in lanes} | hosts | network


def _check_keys(what: str, parts: Any, wanted: Any) -> None:
    if not isinstance(parts, dict) or set(parts) != set(wanted):
        raise ValueError(f"{what} must have just these: {', '.join(wanted)}")


def _check_integer(name: str, value: Any, least: int) -> None:
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
