"""Policies that are not of this package: a file of one's own, or what an installed package offers.

A file is named by its path, which ends in .py. A package offers modules by entry points of the group `GROUP`:

    [project.entry-points."flashmoe.policies"]
    mine = "my_package.my_schedule"

Either has what every file of this folder has, `build(world, knobs)` and `Knobs`; `template.py` is one to begin with.
A file is read again whenever it is asked for, so what was edited counts at once. Leaves out: files that import others
beside them, which a package can.
"""

from __future__ import annotations

import hashlib
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache, lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from ..drafting.knobs import PolicyKnobs

GROUP = "flashmoe.policies"
SUFFIX = ".py"
TEMPLATE = Path(__file__).with_name("template.py")


@cache
def installed() -> dict[str, EntryPoint]:
    """What packages offer, by name, in alphabetical order."""
    return {point.name: point for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}


def is_file(policy: str) -> bool:
    """Whether a policy's name is the path of a file."""
    return policy.lower().endswith(SUFFIX)


def find_outside(policy: str) -> Any:
    """The module behind a path or behind a name of `installed`, which must be one of them.

    Raises:
        FileNotFoundError: no such file; ValueError: it cannot be imported (line and reason), or lacks `build` or
            `Knobs`.
    """
    if is_file(policy):
        path = Path(policy)
        if not path.is_file():
            raise FileNotFoundError(
                f"policy file {policy}: no such file; flashmoe sim --new-policy {policy} writes one"
            )
        return _load(path.resolve(), policy, path.read_bytes())
    with _told(f"policy {policy} of {installed()[policy].value}", None):
        module = installed()[policy].load()
    return _checked(f"policy {policy} of {installed()[policy].value}", module)


@contextmanager
def naming_the_line(policy: str) -> Iterator[None]:
    """What goes wrong with a value inside is told with the line of the policy's file, if it has one."""
    try:
        yield
    except (TypeError, ValueError) as error:
        line = _line(error, Path(policy).resolve()) if is_file(policy) else None
        if line is None:
            raise
        raise type(error)(f"{error} (line {line} of {policy})") from error


@lru_cache(maxsize=64)
def _load(path: Path, name: str, source: bytes) -> Any:
    """The module of this source; by hand, as Python's cache of bytecode misses edits within a second."""
    module = ModuleType(f"flashmoe_policy_{hashlib.sha256(bytes(path)).hexdigest()[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where dataclasses look their annotations up
    with _told(f"policy file {name}", path):
        exec(compile(source, str(path), "exec"), vars(module))
    return _checked(f"policy file {name}", module)


@contextmanager
def _told(what: str, path: Path | None) -> Iterator[None]:
    """Whatever an import raises, even an exit, becomes a ValueError of one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        line = error.lineno if isinstance(error, SyntaxError) else _line(error, path)
        place = f", line {line}" if line else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise ValueError(f"{what}{place}: cannot be imported: {type(error).__name__}: {reason}") from error


def _line(error: BaseException, path: Path | None) -> int | None:
    """The last line of this file that led to the error."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else None


def _checked(what: str, module: Any) -> Any:
    """The module, if it has what a policy must have."""
    if not callable(getattr(module, "build", None)):
        raise ValueError(f"{what}: must have a function build(world, knobs)")
    knobs = getattr(module, "Knobs", None)
    if not (isinstance(knobs, type) and issubclass(knobs, PolicyKnobs)):
        raise ValueError(f"{what}: must have a class Knobs that extends sim.PolicyKnobs, got {knobs!r}")
    if not (is_dataclass(knobs) and "__dataclass_fields__" in vars(knobs)):
        raise ValueError(f"{what}: Knobs must be decorated with @dataclass(frozen=True, kw_only=True)")
    with _told(f"{what}: Knobs() with its defaults", None):
        knobs()
    return module
