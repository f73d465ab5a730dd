"""Many simulations into one file of JSON lines, which a sweep that was stopped takes up again.

A row is one object: its `key`, every parameter (see `point.Point`), and `report`, the numbers of `report.Report`, or
`error` for a combination that cannot be. Rows come in the order in which they finish, and the points go in a shuffled
order: the time left is honest then, and a sweep that was stopped has something of everything.

Invariants: a line that was written stays; whoever is killed, or loses power, leaves at most one damaged line, the last,
which the next one sets aside and computes again; nobody else writes to the file meanwhile. A recording, or the file of
a machine or policy, that was changed makes new rows, in place of the old ones for whoever reads them. Leaves out: which
version of the simulator made a row. When it has changed, or an error was not the combination's fault, begin a new file.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from ..simulation import simulate
from .point import LATER, Point
from .seeds import over_seeds

Row = dict[str, Any]
PARAMETERS = {"key", "ranks", *(field.name for field in fields(Point))} - {*LATER}  # that every row has
KINDS = {"key": str, "ranks": int, **get_type_hints(Point), "knobs": dict, "capacity_factor": float | int | None}
SHOWN = ("latency_us", "tokens_per_s", "tensor_busy", "useful", "resident")  # of a report, in figures
MOST_SHOWN = 1e30
BEGINNING = b'{"key": "'  # of every row; a last line that begins otherwise belongs to somebody else's file


class RowFile:
    """A sweep's file, open for appending; `rows` are those that it had when it was opened.

    A damaged last line is moved to `aside`, a file beside it, which is None if there was none.

    Raises:
        ValueError: it is another kind of file, or another sweep is writing to it.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # a device or a pipe can be read for ever
            raise ValueError(f"{path}: must be a file or not there yet")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            data = self._file.read()
            self.rows, good_bytes = _parse(path, data)
            self.aside = _set_aside(path, data[good_bytes:]) if data[good_bytes:] else None
            self._file.truncate(good_bytes)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path}: another sweep is writing to this file") from None
        except (OSError, ValueError):
            self._file.close()
            raise

    def append(self, row: Row) -> None:
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> RowFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, of the same parameters the last one; a damaged last line is left out.

    Raises:
        FileNotFoundError: no such file; ValueError: another kind of file; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    rows = _parse(path, path.read_bytes())[0]
    names = sorted((PARAMETERS | {*LATER}) - {"key"})
    return list({json.dumps([row[name] for name in names]): row for row in rows}.values())


def missing(points: Iterable[Point], rows: Iterable[Row]) -> list[Point]:
    """The points that have no row yet, shuffled, always alike."""
    there = {row["key"] for row in rows}
    left = [point for point in points if point.key not in there]
    random.Random(0).shuffle(left)
    return left


def run_points(points: Iterable[Point], pool: Executor | None = None) -> Iterator[Row]:
    """A row for each point, as they finish; in this process without a pool."""
    if pool is None:
        yield from map(run_point, points)
        return
    for future in as_completed([pool.submit(run_point, point) for point in points]):
        yield future.result()


def run_point(point: Point) -> Row:
    """The row of a point: its report, or why it cannot be."""
    try:
        knobs = point.policy_knobs()
        _, said = over_seeds(lambda seed: simulate(point.policy, point.world(seed), knobs), point.seed, point.seeds)
        return point.row() | {"report": asdict(said)}
    except ValueError as error:
        return point.row() | {"error": str(error)}
    except Exception as error:
        error.add_note(f"while simulating {point}")
        raise


def _set_aside(path: Path, damaged: bytes) -> Path:
    """Where the damaged end of a file is kept, behind what was kept there before."""
    aside = path.with_name(f"{path.name}.damaged")
    with aside.open("ab") as file:
        file.write(damaged if damaged.endswith(b"\n") else damaged + b"\n")
    return aside


def _parse(path: Path, data: bytes) -> tuple[list[Row], int]:
    """The rows, and the number of bytes that they take; a last line that is damaged counts as not there.

    Damaged is what is no JSON or has no end. If there is no row before it, it must begin as a row does, or the file is
    somebody else's.
    """
    rows: list[Row] = []
    lines = data.splitlines(keepends=True)
    good_bytes = 0
    for number, line in enumerate(lines, start=1):
        value = _value(line)
        ours = bool(rows) or line[: len(BEGINNING)] == BEGINNING[: len(line)]
        if value is None and number == len(lines) and ours:
            break
        if not _is_row(value):
            remedy = f"delete it (sed -i {number}d {path}) and give the command again, which computes it anew"
            raise ValueError(f"{path}: line {number} is no row of a sweep; if others are, {remedy}")
        rows.append(LATER | value)
        good_bytes += len(line)
    return rows, good_bytes


def _value(line: bytes) -> Any:
    """What a line says; None if it is damaged."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _is_row(value: Any) -> bool:
    """Whether it has all parameters, of their types, and numbers in its report if there is one."""
    if not isinstance(value, dict) or not value.keys() >= PARAMETERS:
        return False
    row = LATER | value
    fits = all(isinstance(row[name], kind) for name, kind in KINDS.items()) and row["ranks"] > 0
    return fits and ("report" not in row or _is_report(row["report"]))


def _is_report(report: Any) -> bool:
    """Whether what figures show of it are numbers that can be drawn."""
    return isinstance(report, dict) and all(_can_be_drawn(report.get(name)) for name in SHOWN)


def _can_be_drawn(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < MOST_SHOWN
