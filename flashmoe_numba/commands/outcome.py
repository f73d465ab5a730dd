"""What becomes of a measurement, on rank 0: check it, report it, write the files that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reference import Weights, Workload, make_workload
from reference.traces import Slice

from ..bench.check import check_layer
from ..bench.check_gradients import GradientVerdict, check_gradients
from ..bench.measure import Measurement, Settings, make_weights
from ..bench.report import make_report, table
from ..seeing.trace import decode, write_chrome_trace
from .outputs import give
from .plan import describe


def conclude(
    settings: Settings, parts: Sequence[Measurement], json: str | None, trace: str | None, plot: str | None
) -> int:
    """Exit status: 0 if everything is right.

    Args:
        parts: of all processes, in the order of ranks.
        json, trace, plot: files to write; "-" for json is stdout instead of the table.
    """
    weights = make_weights(settings, range(settings.config.num_ranks))
    routing = [rank for part in parts for rank in part.routing]
    y = [rank for part in parts for rank in part.y]
    workload = _workload(settings, parts)
    verdict = check_layer(settings.config, weights, workload, routing, y)
    of_gradients = _check_backwards(settings, parts, weights, workload) if not verdict.illegal else None
    report = make_report(settings, parts, verdict, of_gradients)
    give(json, table(report, describe(settings.config)), report)
    _write_pictures(settings, parts, trace, plot)
    return 0 if report["passed"] else 1


def _check_backwards(
    settings: Settings, parts: Sequence[Measurement], weights: Weights, workload: Workload
) -> GradientVerdict | None:
    """Of the gradients of all ranks; None, if there were no backwards."""
    routing = [rank for part in parts for rank in part.routing]
    backwards = [part.backwards for part in parts if part.backwards is not None]
    if not backwards:
        return None
    dy = [of_rank for part in backwards for of_rank in part.dy]
    found = [of_rank for part in backwards for of_rank in part.gradients]
    return check_gradients(settings.config, weights, workload, routing, dy, found)


def _workload(settings: Settings, parts: Sequence[Measurement]) -> Workload:
    """All ranks' tokens as they were used, and the routing that the workload asks for."""
    made = make_workload(settings.workload, settings.config, settings.num_tokens, settings.seed)
    return Workload([x for part in parts for x in part.x], made.topk_idx, made.topk_weights)


def _write_pictures(settings: Settings, parts: Sequence[Measurement], trace: str | None, plot: str | None) -> None:
    records: list[Slice] = []
    for part in parts:
        records += decode(part.traces)
    if trace:
        write_chrome_trace(records, parts[0].processors, Path(trace))
    if plot:
        from ..seeing.plots import plot_timeline

        config = settings.config
        plot_timeline(records, parts[0].processors, Path(plot), f"{config.num_ranks} ranks, {describe(config)}")
