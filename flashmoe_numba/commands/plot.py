"""Figures of the rows of a `flashmoe sweep`: those for which the rows vary in what they need, as PNG, with an index.

Nothing is simulated again, and nothing is measured: every figure says "simulated". sim/studies/figures.py lists the
kinds.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from reference.pictures import named_as_picture
from sim.studies.figures import draw_figures
from sim.studies.sweep import Row, read_rows
from sim.studies.ties import row_error

from ..errors import UsageError
from .flags import integer
from .outputs import make_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("rows", type=Path, metavar="FILE.jsonl", help="rows of a sweep")
    add("--out", type=Path, required=True, metavar="FOLDER", help="where the figures go")
    add("--where", action="append", default=[], metavar="KEY=VALUE[,VALUE]", help="these rows only; may be repeated")
    text = (
        "of the simulator, in percent, for rows that do not say their own: what it does not tell apart is a tie in maps"
    )
    add("--error", type=_percent, metavar="PERCENT", help=f"error {text}")
    add("--most", type=integer(1), default=12, metavar="N", help="most figures of one kind [12]")


def main(args: argparse.Namespace) -> int:
    """Draw, and say what was drawn and why not the rest."""
    if not importlib.util.find_spec("matplotlib"):
        raise UsageError("figures need matplotlib, not found here: pip install 'flashmoe-numba[plots]'")
    try:
        rows = read_rows(args.rows)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(str(error)) from None
    for condition in args.where:
        rows = _chosen(rows, condition)
    if named_as_picture(args.out) and not args.out.is_dir():
        raise UsageError(f"argument --out: is a folder, where several figures go as PNG, got {str(args.out)!r}")
    make_folder("--out", str(args.out), args.out)
    files, notes = draw_figures(rows, args.out, args.most, lambda row: _error(row, args.error))
    index = [args.out / "index.html"] if files else []
    print("\n".join([*map(str, files + index), *notes]))
    return 0 if files else 1


def _percent(text: str) -> float:
    """A share of 1."""
    try:
        share = float(text) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 100), got {text!r}")
    return share


def _error(row: Row, otherwise: float | None) -> float | None:
    own = row_error(row)
    return otherwise if own is None else own


def _chosen(rows: Sequence[Row], condition: str) -> list[Row]:
    """The rows whose parameter has one of the values."""
    name, _, values = condition.partition("=")
    known = sorted({key for row in rows for key in row} - {"key", "report", "error", "knobs"})
    if name not in known or not values:
        raise UsageError(f"argument --where: must be KEY=VALUE with a KEY of {', '.join(known)}; got {condition!r}")
    chosen = [row for row in rows if str(row[name]) in values.split(",")]
    if not chosen:
        there = ", ".join(sorted({str(row[name]) for row in rows}))
        raise UsageError(f"argument --where: no row has {condition}; {name} is one of {there}")
    return chosen
