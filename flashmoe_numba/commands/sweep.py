"""Simulate all combinations of a grid into one file of JSON lines, on all cores or on the ranks of an mpirun.

A sweep that was stopped goes on by the same command: only what is missing is run. sim/studies/grid.py describes
FILE.toml, and experiments/grids has examples.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from sim.studies.grid import load_grid
from sim.studies.point import Point
from sim.studies.sweep import Row, RowFile, missing, run_points

from ..errors import UsageError
from ..processes import launch
from ..processes.pools import Pool
from .outputs import make_folder
from .spread import STOPS, add_jobs_argument, open_pool, progress, stopped_status, why_stopped

MOST_ERRORS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", type=Path, metavar="FILE.toml", help="what to combine")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="rows as JSON lines; goes on with it")
    add_jobs_argument(parser.add_argument)


def main(args: argparse.Namespace) -> int:
    """Run what is missing of the grid."""
    try:
        points = load_grid(args.grid)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from None
    with open_pool(args.jobs) as pool:
        return _run(args.out, points, pool) if launch.is_first_rank() else 0


def _run(out: Path, points: Sequence[Point], pool: Pool | None) -> int:
    make_folder("--out", str(out), out.parent)
    try:
        file = RowFile(out)
    except (OSError, ValueError) as error:
        raise UsageError(f"argument --out: {error}") from None
    if file.aside is not None:
        what = "was damaged, maybe because it was being written when a sweep was killed"
        print(f"flashmoe sweep: the last line of {out} {what}: it is in {file.aside} now, and is computed again",
              file=sys.stderr)  # fmt: skip
    with file:
        left = missing(points, file.rows)
        keys = {point.key for point in points}
        rows = [row for row in file.rows if row["key"] in keys]
        try:
            for row in progress(run_points(left, pool), len(left), "points"):
                file.append(row)
                rows.append(row)
        except STOPS as error:
            state = f"{len(rows)} of {len(points)} rows are in {out}, and the same command goes on from there"
            print(f"flashmoe sweep: {why_stopped(error)}; {state}", file=sys.stderr)
            return stopped_status(error)
    print("\n".join(_summary(out, rows, len(left))))
    return 0


def _summary(out: Path, rows: Sequence[Row], num_new: int) -> Iterator[str]:
    errors = Counter(row["error"] for row in rows if "error" in row)
    yield f"{len(rows)} simulated rows of the grid are in {out}, {num_new} of them new"
    if errors:
        yield f"{errors.total()} combinations cannot be:"
    for error, number in errors.most_common(MOST_ERRORS):
        yield f"  {number} x {error}"
    if len(errors) > MOST_ERRORS:
        yield f'  and {len(errors) - MOST_ERRORS} other reasons: see "error" in the rows'
