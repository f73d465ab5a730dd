"""What `flashmoe validate --folds` says: errors on rows that the fit never saw, beside those on rows that it did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sim.drafting.trust import RANGES
from sim.validation.compare import Result, mean_error
from sim.validation.folds import Fold, by_gpu, errors_by_range
from sim.validation.written import table


def fold_lines(folds: Sequence[Fold]) -> Iterator[str]:
    """Each fold, and the means by policy, GPU and tokens per rank."""
    yield ""
    yield "left out one (source, model) at a time: mean errors without their signs, with the numbers fitted to all rows"
    yield "(in sample), and with those fitted to the rest (left out), which are given"
    for fold in folds:
        yield from _fold_lines(fold)
    yield ""
    yield "by policy, GPU and tokens per rank: in sample / left out"
    yield f"  {'policy':10}{'GPU':6}{'rows':>4}{'all':>17}" + "".join(f"{name:>17}" for name in RANGES)
    for (policy, gpu), group in by_gpu(folds).items():
        before = [result for fold in group for result in fold.in_sample]
        after = [result for fold in group for result in fold.results]
        yield f"  {policy:10}{gpu:6}{len(after):4}{_pair(before, after)}" + "".join(_ranges(before, after))


def _fold_lines(fold: Fold) -> Iterator[str]:
    count = len(fold.results)
    yield f"  {fold.policy} on {fold.gpu}: {fold.source}, {fold.model}"
    worst = max(fold.results, key=lambda result: abs(result.error))
    errors = f"in sample {mean_error(fold.in_sample):.1%}, left out {mean_error(fold.results):.1%}"
    rows = f"{count} row{'s' * (count > 1)}"
    yield f"    {rows}: {errors}, worst {worst.error:+.1%}; {table(fold.values)} {_origin(fold)}"


def _origin(fold: Fold) -> str:
    if fold.seen:
        return f"from {fold.seen} other row{'s' * (fold.seen > 1)}"
    return f"carried over from {', '.join(fold.donors)}" if fold.donors else "assumed: nothing else is published"


def _ranges(before: Sequence[Result], after: Sequence[Result]) -> Iterator[str]:
    seen, unseen = errors_by_range(before), errors_by_range(after)
    for name in RANGES:
        yield f"{_percent(seen[name], unseen[name]) if name in seen else '-':>17}"


def _pair(before: Sequence[Result], after: Sequence[Result]) -> str:
    return f"{_percent(mean_error(before), mean_error(after)):>17}"


def _percent(before: float, after: float) -> str:
    return f"{before:.1%} / {after:.1%}"


def fold_json(fold: Fold) -> dict[str, Any]:
    """A fold as JSON."""
    return {
        "policy": fold.policy,
        "gpu": fold.gpu,
        "source": fold.source,
        "model": fold.model,
        "values": dict(fold.values),
        "donors": list(fold.donors),
        "rows_seen": fold.seen,
        "in_sample_error": mean_error(fold.in_sample),
        "left_out_error": mean_error(fold.results),
        "rows": [_row(result) for result in fold.results],
    }


def _row(result: Result) -> dict[str, Any]:
    row = result.case.row
    return {"file": row.file, "line": row.line, "measured": result.case.measured, "simulated": result.simulated}
