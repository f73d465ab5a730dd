"""Schedules, one file each: `build(world, knobs)` makes the graph, `Knobs` says what can be changed.

Each file opens with the schedule in a paragraph, its source, and what it leaves out. All run on the same world. A
policy's name is one of `policy_names()`, or the path of a .py file (`outside.py`). One that computes the shared expert,
which others leave out, says so by `SHARED_EXPERT = True`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ..drafting.knobs import PolicyKnobs
from ..drafting.rates import fitted_rate
from ..engine.graph import TaskGraph
from ..world.world import World
from .outside import GROUP, SUFFIX, find_outside, installed, is_file, naming_the_line

POLICY_NAMES = ("flashmoe", "comet", "megamoe", "sonic", "t3", "scmoe", "nanoflow", "bulk", "fastermoe", "deepep")


def policy_names() -> tuple[str, ...]:
    """Those of this package, then those that installed packages offer under other names."""
    return (*POLICY_NAMES, *(name for name in installed() if name not in POLICY_NAMES))


def make_knobs(policy: str, values: Mapping[str, Any]) -> PolicyKnobs:
    """The knobs of a policy with these values changed.

    Raises:
        TypeError: the policy's name is no text; FileNotFoundError: no such file; ValueError: no such policy, its file
            is none, no such knob (lists those there are), or a value out of its range.
    """
    kind = _module(policy).Knobs
    names = [field.name for field in fields(kind)]
    for name in values:
        if name not in names:
            raise ValueError(f"policy {policy} has the knobs {', '.join(names)}; got {name!r}")
    made: PolicyKnobs = kind(**values)
    return made


def build(policy: str, world: World, knobs: PolicyKnobs | None = None) -> TaskGraph:
    """The graph of a policy in a world; default knobs where none are given.

    Raises:
        ValueError: no such policy, its knobs do not go with the world, or the layer has a shared expert, which this
            policy leaves out; TypeError: knobs of another policy, or what it made is no graph.
    """
    module = _module(policy)
    if world.config.shared_ffn and not getattr(module, "SHARED_EXPERT", False):
        having = ", ".join(name for name in POLICY_NAMES if getattr(_module(name), "SHARED_EXPERT", False))
        rule = f"shared_ffn must be 0 with policy {policy}: only {having} has a shared expert"
        raise ValueError(f"{rule}, got {world.config.shared_ffn}")
    knobs = make_knobs(policy, {}) if knobs is None else knobs
    if not isinstance(knobs, module.Knobs):
        raise TypeError(f"knobs must be of policy {policy}, such as make_knobs({policy!r}, {{}}); got {knobs!r}")
    graph: TaskGraph = module.build(world, knobs) if policy in POLICY_NAMES else _build_outside(policy, world, knobs)
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
