"""What experiments 31 and 34 share, which lose ranks: their flags, what they say of a run, and their rows."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from common import Row, machine, parser_of, show

from flashmoe_numba.commands.flags import integer, seconds


class Verdict(Protocol):
    """Of a run: ranks by what they ended with, and what is not as it should be, in words."""

    right: int
    named: int
    other: list[str]
    over_ms: list[float]
    problems: list[str]


def lost_parser(
    description: str | None, faults: Iterable[str], *, runs: int, of_what: str, deadline_s: float
) -> argparse.ArgumentParser:
    """The flags of both, with these defaults."""
    parser = parser_of(description)
    parser.add_argument("--runs", type=integer(0), default=runs, help=f"{of_what}over all faults [{runs}]")
    parser.add_argument("--deadline-s", type=seconds, default=deadline_s, help=f"of a call [{deadline_s:g}]")
    parser.add_argument("--fault", choices=faults, action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=integer(0), default=0)
    return parser


def tell(number: int, name: str, verdict: Verdict) -> None:
    """What is to be read of a run, at once."""
    for problem in verdict.problems:
        print(f"run {number}, {name}: {problem}", flush=True)
    for text in verdict.other:
        print(f"run {number}, {name}, other: {text}", flush=True)


def row_of(fault: str, verdicts: Sequence[Verdict]) -> Row:
    """Of all runs with a fault."""
    return {
        "fault": fault,
        "runs": len(verdicts),
        "right": sum(verdict.right for verdict in verdicts),
        "named": sum(verdict.named for verdict in verdicts),
        "other": sum(len(verdict.other) for verdict in verdicts),
        "over_ms": max((ms for verdict in verdicts for ms in verdict.over_ms), default=None),
        "problems": sum(len(verdict.problems) for verdict in verdicts),
    }


def terms(args: argparse.Namespace, *names: str) -> Row:
    """What a row was measured on, and how: these flags and those of both."""
    return machine() | {name: getattr(args, name) for name in (*names, "deadline_s", "seed")}


def show_rows(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """The table."""
    show([row | {"over_ms": "" if row["over_ms"] is None else f"{row['over_ms']:.0f}"} for row in rows], dict(columns))
