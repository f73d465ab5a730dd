"""Planted bugs: small, realistic faults of the kernel, each one edit of its source, that the tools must find.

They are the tables of plants.toml, which says how to add one. `planted(PLANTS[name])` makes the interpreted kernel one
with that fault in it. An edit has to fit exactly one place, so that a plant cannot outlive the code it was made for.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..device.compilation import PACKAGE, load_interpreted
from .worlds import PLAIN

KERNEL = PACKAGE / "kernel"
INTERPRETED = "flashmoe_numba.kernel_interpreted"  # where device.compilation.interpreted looks first


@dataclass(frozen=True)
class Plant:
    """One fault.

    Args:
        name: for `--plant`.
        summary: one line.
        file, old, new: in `flashmoe_numba/kernel/file`, `old` becomes `new`.
        found_by: the kinds of report (reports.KINDS) that it was found by, the most frequent one first. Which one comes
            first in a run depends on the world and the schedule.
        weak: it shows only where loads of atomic words may be late (run/words.py).
        world: one of worlds.WORLDS in which it is found, under the random strategy or PCT.
    """

    name: str
    summary: str
    file: str
    old: str
    new: str
    found_by: tuple[str, ...]
    weak: bool = False
    world: str = PLAIN


@contextlib.contextmanager
def planted(plant: Plant) -> Iterator[ModuleType]:
    """The interpreted kernel, everywhere in this process, is an edited copy; afterwards it is what it was.

    Raises:
        ValueError: the edit does not fit exactly one place.
    """
    with tempfile.TemporaryDirectory(prefix="flashmoe-plant-") as temporary, _without_the_interpreted_kernel():
        folder = Path(temporary) / "kernel"
        shutil.copytree(KERNEL, folder, ignore=shutil.ignore_patterns("__pycache__"))
        _edit(folder / plant.file, plant)
        yield load_interpreted(folder, INTERPRETED)


def _edit(file: Path, plant: Plant) -> None:
    source = file.read_text(encoding="utf-8")
    places = source.count(plant.old)
    if places != 1:
        raise ValueError(f"plant {plant.name} must fit one place of {plant.file}, but {plant.old!r} is there {places}x")
    file.write_text(source.replace(plant.old, plant.new), encoding="utf-8")


@contextlib.contextmanager
def _without_the_interpreted_kernel() -> Iterator[None]:
    """Take its modules away, and bring them back in the end in place of those that came meanwhile."""
    before = _take_modules()
    try:
        yield
    finally:
        _take_modules()
        sys.modules.update(before)


def _take_modules() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if f"{name}.".startswith(f"{INTERPRETED}.")]
    return {name: sys.modules.pop(name) for name in names}


def _read() -> dict[str, Plant]:
    rows = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return {name: Plant(name, **row | {"found_by": tuple(row["found_by"])}) for name, row in rows.items()}


PLANTS = _read()
