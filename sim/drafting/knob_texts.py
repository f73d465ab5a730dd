"""What classes of knobs say of each: the entries of `Args:` in their docstrings, and where a default is from.

An entry ends with "Default: ...": a source; or "assumption", a guess with its reason, behind which no measurement
stands; or "choice", where nothing is right or wrong.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

from .knobs import PolicyKnobs

NOT_STATED = "not stated"
_ENTRY = re.compile(r"(\w+(?:, \w+)*): (.*)", re.DOTALL)


class KnobText(NamedTuple):
    """What a knob is, and where its default is from."""

    meaning: str
    default: str


def knob_texts(kind: type[PolicyKnobs]) -> dict[str, KnobText]:
    """By name, of all knobs of a policy; those of `PolicyKnobs` first. Nothing is missing, if need be `NOT_STATED`."""
    said: dict[str, KnobText] = {}
    for each in reversed(kind.__mro__):
        said |= dict(_entries(inspect.cleandoc(vars(each).get("__doc__") or "")))
    names = [field.name for field in fields(kind)]
    return {name: said.get(name, KnobText("", NOT_STATED)) for name in names}


def _entries(doc: str) -> Iterator[tuple[str, KnobText]]:
    """Each name of the section `Args:`, and what is said of it."""
    section = re.search(r"^Args:\n((?:.+\n?)+)", doc, re.MULTILINE)
    if section is None:
        return
    for entry in re.split(r"\n(?! )", inspect.cleandoc(section.group(1))):
        match = _ENTRY.fullmatch(" ".join(entry.split()))
        if match is not None:
            meaning, _, default = match[2].partition(" Default: ")
            text = KnobText(meaning.rstrip("."), default.rstrip(".") or NOT_STATED)
            yield from ((name, text) for name in match[1].split(", "))
