"""`--set KNOB=VALUE`: the knobs of schedules, typed by the annotations of their dataclasses."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import fields
from types import NoneType
from typing import Any

from sim import PolicyKnobs, make_knobs

from ..errors import UsageError

RULES = {int: "an integer", float: "a number", bool: "true or false", str: "a word"}


def knobs_from(policies: Sequence[str], pairs: Sequence[str], terms: str = "system") -> dict[str, PolicyKnobs]:
    """The knobs of each policy on these terms, with all of `pairs` ("KNOB=VALUE") set in each.

    Raises:
        UsageError: a policy has no such knob, or the value breaks its rule.
    """
    given = dict(_split(pair) for pair in pairs)
    for name in given:
        lacking = [policy for policy in policies if name not in knob_types(policy)]
        if lacking:
            there = ", ".join(knob_types(lacking[0]))
            raise UsageError(f"argument --set: no knob {name!r} in {', '.join(lacking)}; {lacking[0]} has {there}")
    return {policy: _make(policy, given, terms) for policy in policies}


def knob_types(policy: str) -> dict[str, Any]:
    """The type of each knob by name."""
    kind = type(make_knobs(policy, {}))
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def _split(pair: str) -> tuple[str, str]:
    name, equals, text = pair.partition("=")
    if not (name and equals and text):
        raise UsageError(f"argument --set: must be KNOB=VALUE, got {pair!r}")
    return name, text


def _make(policy: str, given: dict[str, str], terms: str) -> PolicyKnobs:
    types = knob_types(policy)
    try:
        return make_knobs(policy, {name: parse(name, text, types[name]) for name, text in given.items()}, terms)
    except (TypeError, ValueError) as error:
        raise UsageError(f"argument --set: {error}") from None


def parse(name: str, text: str, kind: Any) -> Any:
    """The value of a knob of this type (int, float, bool, str, or one of these or None).

    Raises:
        ValueError: naming the knob, the value and the rule.
    """
    options = typing.get_args(kind) or (kind,)
    if NoneType in options and text.lower() == "none":
        return None
    kind = next(option for option in options if option is not NoneType)
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        rule = RULES[kind] + (" or none" if NoneType in options else "")
        raise ValueError(f"{name} must be {rule}, got {text!r}") from None
