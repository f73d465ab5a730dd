"""Simulate all combinations of a grid into one file of JSON lines, on all cores or on the ranks of an mpirun.

A sweep that was stopped goes on by the same command: only what is missing is run. sim/grid.py describes FILE.toml, and
experiments/grids has examples.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from sim.grid import Point, load_grid
from sim.pools import mpi_pool, process_pool
from sim.sweep import Row, RowFile, missing, run_points

from ..bench import launch
from . import UsageError
from .sizes import integer

MOST_ERRORS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", type=Path, metavar="FILE.toml", help="what to combine")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="rows as JSON lines; goes on with it")
    parser.add_argument("--jobs", type=integer(1), metavar="N", help="processes [cores]; not under mpirun")


def main(args: argparse.Namespace) -> int:
    """Run what is missing of the grid."""
    if launch.inside_mpirun() and args.jobs is not None:
        raise UsageError("argument --jobs: under mpirun its ranks are the processes")
    try:
        points = load_grid(args.grid)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from None
    with _pool(args.jobs) as pool:
        return _run(args.out, points, pool) if launch.is_first_rank() else 0


def _pool(jobs: int | None) -> AbstractContextManager[Executor | None]:
    if launch.inside_mpirun():
        return mpi_pool()
    jobs = len(os.sched_getaffinity(0)) if jobs is None else jobs
    return nullcontext() if jobs == 1 else process_pool(jobs)


def _run(out: Path, points: Sequence[Point], pool: Executor | None) -> int:
    try:
        file = RowFile(out)
    except (OSError, ValueError) as error:
        raise UsageError(f"argument --out: {error}") from None
    with file:
        left = missing(points, file.rows)
        keys = {point.key for point in points}
        rows = [row for row in file.rows if row["key"] in keys]
        try:
            for row in _progress(left, pool):
                file.append(row)
                rows.append(row)
        except (KeyboardInterrupt, BrokenProcessPool, MemoryError) as error:
            return _say_stopped(error, f"{len(rows)} of {len(points)} rows are in {out}")
    print("\n".join(_summary(out, rows, len(left))))
    return 0


def _progress(points: Sequence[Point], pool: Executor | None) -> Iterator[Row]:
    """Rows as they finish, with the time left where stderr is a terminal."""
    from tqdm import tqdm

    disable = None if not os.environ.get(launch.TERMINAL_VARIABLE) else False
    with tqdm(total=len(points), desc="simulated", unit="point", disable=disable, dynamic_ncols=True) as bar:
        for row in run_points(points, pool):
            yield row
            bar.update()


def _say_stopped(error: BaseException, state: str) -> int:
    reasons: dict[type, str] = {BrokenProcessPool: "a process died, maybe for lack of memory: try fewer --jobs"}
    reasons |= {KeyboardInterrupt: "interrupted", MemoryError: "out of memory: try fewer --jobs"}
    print(f"flashmoe sweep: {reasons[type(error)]}; {state}, and the same command goes on from there", file=sys.stderr)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def _summary(out: Path, rows: Sequence[Row], num_new: int) -> Iterator[str]:
    errors = Counter(row["error"] for row in rows if "error" in row)
    yield f"{len(rows)} simulated rows of the grid are in {out}, {num_new} of them new"
    if errors:
        yield f"{errors.total()} combinations cannot be:"
    for error, number in errors.most_common(MOST_ERRORS):
        yield f"  {number} x {error}"
    if len(errors) > MOST_ERRORS:
        yield f'  and {len(errors) - MOST_ERRORS} other reasons: see "error" in the rows'
