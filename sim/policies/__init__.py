"""Schedules, one file each: `build(world, knobs)` makes the graph, `Knobs` says what can be changed.

Each file opens with the schedule in a paragraph, its source, and what it leaves out. All run on the same world. A
policy's name is one of `policy_names()`, or the path of a .py file (`outside.py`). One whose graph has no tasks of the
shared expert (`drafting/shared.py`) is refused for layers that have one.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from reference.scalars import check_one_of

from ..drafting.knobs import PolicyKnobs
from ..drafting.rates import DEFAULTS, RATE, fitted_rate
from ..engine.graph import TaskGraph
from ..engine.kinds import SHARED0
from ..world.world import FORWARD, World
from .outside import GROUP, SUFFIX, find_outside, installed, is_file, naming_the_line

POLICY_NAMES = ("flashmoe", "comet", "megamoe", "sonic", "t3", "scmoe", "nanoflow", "bulk", "fastermoe", "deepep")
TERMS = ("system", "schedule")
SAME: Mapping[str, Any] = {  # of those that have them
    "tile_m": 128, "least_tile_m": 128, "ladder": False, "tile_n": 256, RATE: DEFAULTS[RATE], "cluster": 1,
}  # fmt: skip


def policy_names() -> tuple[str, ...]:
    """Those of this package, then those that installed packages offer under other names."""
    return (*POLICY_NAMES, *(name for name in installed() if name not in POLICY_NAMES))


def make_knobs(policy: str, values: Mapping[str, Any], terms: str = "system") -> PolicyKnobs:
    """The knobs of a policy with these values changed.

    Args:
        terms: one of `TERMS`: "system", each policy's own tiles and fitted rate, or "schedule", the same tiles and rate
            for all (`SAME`), so that what differs is the order of the work.

    Raises:
        TypeError: the policy's name is no text; FileNotFoundError: no such file; ValueError: no such policy or terms,
            its file is none, no such knob (lists those there are), or a value out of its range.
    """
    check_one_of("terms", terms, TERMS)
    kind = _module(policy).Knobs
    names = [field.name for field in fields(kind)]
    for name in values:
        if name not in names:
            raise ValueError(f"policy {policy} has the knobs {', '.join(names)}; got {name!r}")
    same = {name: value for name, value in SAME.items() if terms == "schedule" and name in names}
    made: PolicyKnobs = kind(**(same | dict(values)))
    return made


def passes_of(policy: str) -> tuple[str, ...]:
    """Which of `world.PASSES` a policy can be asked for: what its module says as `PASSES`, by default a forward."""
    found: tuple[str, ...] = getattr(_module(policy), "PASSES", (FORWARD,))
    return found


def row_tile(policy: str, knobs: PolicyKnobs) -> int:
    """Rows of a tile, to whose multiples tokens are rounded.

    Raises:
        ValueError: the policy chooses it by the layer.
    """
    tile_m = getattr(knobs, "tile_m", None)
    if tile_m is None:
        raise ValueError(f"policy {policy} chooses its row tile: set its knob tile_m")
    return int(tile_m)


def build(policy: str, world: World, knobs: PolicyKnobs | None = None) -> TaskGraph:
    """The graph of a policy in a world; default knobs where none are given.

    Raises:
        ValueError: no such policy, its knobs do not go with the world, it has no backward and the world asks for one,
            or the layer has a shared expert and the graph none; TypeError: knobs of another policy, or what it made is
            no graph.
    """
    knobs = knobs_in_world(policy, world, knobs)
    if world.passes not in passes_of(policy):
        able = ", ".join(name for name in policy_names() if world.passes in passes_of(name))
        raise ValueError(f"passes must be {FORWARD} with policy {policy}; others have {able}; got {world.passes}")
    graph = _build(policy, world, knobs) if policy in POLICY_NAMES else _build_outside(policy, world, knobs)
    if world.config.shared_ffn and not (graph.nodes["kind"] == SHARED0).any():
        rule = f"shared_ffn must be 0 with policy {policy} and these knobs, which leave the shared expert out"
        raise ValueError(f"{rule}; got {world.config.shared_ffn}")
    return graph


def _build(policy: str, world: World, knobs: PolicyKnobs) -> TaskGraph:
    graph: TaskGraph = _module(policy).build(world, knobs)
    return graph


def _build_outside(policy: str, world: World, knobs: PolicyKnobs) -> TaskGraph:
    """By the rate that reports say, whatever name its file gives to `Draft`: it may be a copy of another one's."""
    rate = fitted_rate(policy, world.hardware.chip) if knobs.rate is None else knobs.rate
    with naming_the_line(policy):
        graph = _module(policy).build(world, replace(knobs, rate=rate))
    if not isinstance(graph, TaskGraph):
        raise TypeError(
            f"build of policy {policy} must return a TaskGraph, as draft.builder.build() does; got {graph!r}"
        )
    return graph


def knobs_in_world(policy: str, world: World, knobs: PolicyKnobs | None) -> PolicyKnobs:
    """The knobs, by default the policy's own, with what they leave to the layer chosen.

    Raises:
        TypeError: knobs of another policy.
    """
    knobs = make_knobs(policy, {}) if knobs is None else knobs
    if not isinstance(knobs, _module(policy).Knobs):
        raise TypeError(f"knobs must be of policy {policy}, such as make_knobs({policy!r}, {{}}); got {knobs!r}")
    with naming_the_line(policy):
        chosen: PolicyKnobs = knobs.in_world(world)
    return chosen


def describe(policy: str) -> str:
    """The first line of the policy's file."""
    return (_module(policy).__doc__ or "not described").strip().splitlines()[0]


def _module(policy: str) -> Any:
    if not isinstance(policy, str):
        raise TypeError(f"policy must be a name or the path of a {SUFFIX} file, got {policy!r}")
    if policy in POLICY_NAMES:
        return importlib.import_module(f".{policy}", __name__)
    if is_file(policy) or policy in installed():
        return find_outside(policy)
    other = f"the path of a {SUFFIX} file, or what a package offers in the group {GROUP}"
    raise ValueError(f"policy must be one of {', '.join(policy_names())}, {other}; got {policy!r}")
