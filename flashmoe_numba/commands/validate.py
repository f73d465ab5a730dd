"""Published measurements beside what the simulator says of the same layers, row by row, with the errors by group.

With --fit, first finds the numbers of each policy and GPU, two at most, that bring its rows closest, and writes them to
sim/drafting/rates.toml; with --data too, those of policies and GPUs that its tables say nothing of stay.
With --folds, says how far off fits are on rows that they never saw: one (source, model) after the other is left out.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sim.validation.cases import Case, Reason, sort_rows
from sim.validation.compare import Group, Result, compare
from sim.validation.fit import Fit, fit_all
from sim.validation.folds import Fold, leave_out, write_trust
from sim.validation.tables import FOLDER, Row, read_folder
from sim.validation.written import table, write_rates

from ..errors import UsageError
from .left_out import fold_json, fold_lines
from .outputs import add_json_argument, check_outputs, give
from .patience import clock
from .spread import progress

WIDTH = 120
NotCompared = Sequence[tuple[Row, Reason]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    folder = "folder with .csv files of the columns of sim/data/README.md, instead of those there"
    parser.add_argument("--data", metavar="DIR", type=Path, default=FOLDER, help=folder)
    parser.add_argument(
        "--fit", action="store_true", help="fit the numbers to these tables and write sim/drafting/rates.toml"
    )
    parser.add_argument(
        "--folds",
        action="store_true",
        help="leave out one (source, model) at a time; without --data the errors go to sim/drafting/trust.toml, too",
    )
    add_json_argument(parser)


def main(args: argparse.Namespace) -> int:
    """Compare, after fitting if asked to."""
    check_outputs({"--json": args.json})
    try:
        rows = read_folder(args.data)
    except ValueError as error:
        raise UsageError(str(error).replace("data must be", "--data must be", 1)) from None
    cases, rest = sort_rows(rows)
    groups, refused = _compared(cases)
    fits, folds = [], []
    if args.fit:
        with clock("fitting"):
            fits = fit_all(_cases_of(groups))
        write_rates(fits, keep=args.data != FOLDER)
        groups, refused = _compared(cases)
    rest += refused
    if args.folds:
        with clock("leaving out one (source, model) at a time"):
            folds = leave_out(_cases_of(groups))
    if folds and args.data == FOLDER:
        write_trust(folds)
    give(args.json, lines(len(rows), groups, rest, fits, folds), as_json(groups, rest, fits, folds))
    return 0


def _compared(cases: Sequence[Case]) -> tuple[list[Group], list[tuple[Row, Reason]]]:
    """The groups, and how many rows are simulated meanwhile."""
    return compare(progress(cases, len(cases), "rows"))


def _cases_of(groups: Sequence[Group]) -> Iterator[Case]:
    return (result.case for group in groups for result in group.results)


# ---- what people read ----


def lines(
    num_rows: int, groups: Sequence[Group], rest: NotCompared, fits: Sequence[Fit], folds: Sequence[Fold]
) -> Iterator[str]:
    """The whole report."""
    yield f"simulated beside measured: {num_rows - len(rest)} of {num_rows} published rows"
    yield "at most two fitted numbers per policy and GPU, all else from the presets; routing even where none is stated"
    if fits:
        yield from _fit_lines(fits)
    for group in groups:
        yield from _group_lines(group)
    yield from _summary_lines(groups)
    yield from _rest_lines(rest)
    if folds:
        yield from fold_lines(folds)


def _fit_lines(fits: Sequence[Fit]) -> Iterator[str]:
    yield ""
    yield "fitted numbers, written to sim/drafting/rates.toml"
    yield f"  {'policy':10}{'GPU':6}{'rows':>4}{'error':>8}  {'before':40}{'error':>8}  now"
    for fit in fits:
        old, new = f"{fit.old_error:8.1%}  {table(fit.old_values):40}", f"{fit.error:8.1%}  {table(fit.values)}"
        yield f"  {fit.policy:10}{fit.gpu:6}{fit.num_rows:4}{old}{new}"


def _group_lines(group: Group) -> Iterator[str]:
    key, rule = group.key, group.results[0].case.rule
    yield ""
    yield f"{key.policy} on {key.gpu}, {key.quantity}: {key.system}, {key.source}"
    if rule.why_not:
        yield f"  not fitted: {rule.why_not}"
    units = f"{'simulated ' + key.unit:>16}{'measured ' + key.unit:>15}{'error':>9}"
    yield f"  {'hardware':10}{'tokens':>7}{'hidden':>7}{'ffn':>7}{'experts':>8}{'k':>3} {units}"
    for result in group.results:
        yield _result_line(result)


def _result_line(result: Result) -> str:
    world, config = result.case.world, result.case.world.config
    sizes = f"{config.num_tokens:7}{config.hidden:7}{config.ffn:7}{config.num_experts:8}{config.num_topk:3} "
    values = f"{result.simulated:16,.1f}{result.case.measured:15,.1f}{result.error:+9.1%}"
    return f"  {world.hardware.name:10}{sizes}{values}"


def _summary_lines(groups: Sequence[Group]) -> Iterator[str]:
    yield ""
    yield "mean of the errors without their signs, and the worst"
    yield f"  {'policy':10}{'GPU':6}{'rows':>4}{'mean':>8}{'worst':>9}  {'':11}quantity, system, source"
    for group in groups:
        key = group.key
        errors = f"{len(group.results):4}{group.mean_error:8.1%}{group.worst.error:+9.1%}"
        fitted = "fitted" if group.results[0].case.rule.fitted else "not fitted"
        yield f"  {key.policy:10}{key.gpu:6}{errors}  {fitted:11}{key.quantity}, {key.system}, {key.source}"


def _rest_lines(rest: NotCompared) -> Iterator[str]:
    yield ""
    yield f"not compared: {len(rest)} rows"
    for why, count in Counter(reason.why for _, reason in rest).most_common():
        what = dict.fromkeys(reason.what for _, reason in rest if reason.why == why)
        line = f"  {count:4}  {why}: {'; '.join(what)}"
        yield line if len(line) <= WIDTH else f"{line[: WIDTH - 4].rstrip()} ..."


# ---- what programs read ----


def as_json(groups: Sequence[Group], rest: NotCompared, fits: Sequence[Fit], folds: Sequence[Fold]) -> dict[str, Any]:
    return {
        "groups": [_group_json(group) for group in groups],
        "not_compared": [{**asdict(row), "reason": reason.why, "what": reason.what} for row, reason in rest],
        "fits": [asdict(fit) for fit in fits],
        "folds": [fold_json(fold) for fold in folds],
    }


def _group_json(group: Group) -> dict[str, Any]:
    rule = group.results[0].case.rule
    return {
        **group.key._asdict(),
        "fitted": rule.fitted,
        "why_not": rule.why_not,
        "mean_error": group.mean_error,
        "worst_error": group.worst.error,
        "results": [_result_json(result) for result in group.results],
    }


def _result_json(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "row": asdict(case.row),
        "hardware": case.world.hardware.name,
        "config": asdict(case.world.config),
        "precision": case.world.precision.name,
        "routing": case.world.routing.name,
        "knobs": case.knobs,
        "simulated": result.simulated,
        "measured": case.measured,
        "error": result.error,
    }
