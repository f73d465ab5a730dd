"""What a benchmark found, as JSON and as a table."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

import numpy as np

from reference import MoEConfig
from reference.plan import row_flops
from reference.runs import PACKINGS

from ..heap.stats import Stats
from .check import Verdict
from .check_gradients import GradientVerdict
from .measure import Measurement, Settings

PACKAGES = ("numpy", "numba")


def make_report(
    settings: Settings, parts: Sequence[Measurement], verdict: Verdict, of_gradients: GradientVerdict | None = None
) -> dict[str, Any]:
    """One JSON object; numbers that do not exist are None.

    An iteration's time is that of its slowest rank; rates are at the median. `gflops` and `blas_gflops` count the same
    operations: 2 per multiply-add of real rows in the experts' matrices of all ranks.

    Args:
        parts: of all processes, in the order of ranks.
        of_gradients: of the backwards, if there are any.
    """
    stats = [rank for part in parts for rank in part.stats]
    return {
        "backend": settings.backend,
        "transport": settings.transport,
        "hosts": settings.hosts,
        "netmod": settings.netmod,
        "ranks": settings.config.num_ranks,
        "processors": parts[0].processors,
        "packing": settings.packing,
        "arithmetic": settings.multiplied_by,
        "config": asdict(settings.config),
        "checkpoint": settings.checkpoint,
        "layer": settings.layer if settings.checkpoint else None,
        "workload": settings.workload,
        "seed": settings.seed,
        "iterations": settings.iterations,
        **_speed(settings, parts, stats),
        **_rows(stats),
        "save": settings.save,
        "backward": _backwards(settings.config, parts, stats, of_gradients),
        **_judgement(parts, verdict, of_gradients),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES},
    }


def _spread_ms(of_parts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of iterations, each of which takes as long as its slowest rank, in ns."""
    slowest = np.max(of_parts, axis=0) / 1e6
    return {"median": float(np.median(slowest)), "min": float(slowest.min()), "max": float(slowest.max())}


def _speed(settings: Settings, parts: Sequence[Measurement], stats: Sequence[Stats]) -> dict[str, Any]:
    latency_ms = _spread_ms([part.latency_ns for part in parts])
    median_ns = latency_ms["median"] * 1e6
    blas_ns = float(np.median(np.max([part.blas_ns for part in parts], axis=0)))
    flops = row_flops(settings.config) * sum(rank.received_rows for rank in stats)
    return {
        "latency_ms": latency_ms,
        "tokens_per_s": sum(rank.num_tokens for rank in stats) / median_ns * 1e9,
        "gflops": flops / median_ns,
        "blas_gflops": flops / blas_ns if flops else None,
        "blas_share": blas_ns / median_ns if flops else None,
    }


def _rows(stats: Sequence[Stats]) -> dict[str, Any]:
    received, padded = sum(rank.received_rows for rank in stats), sum(rank.padded_rows for rank in stats)
    return {
        "sent_rows": sum(rank.sent_rows for rank in stats),
        "row_tiles": sum(rank.row_tiles for rank in stats),
        "padded_row_share": 1 - received / padded if padded else 0.0,
        "dropped_pairs": sum(rank.dropped_pairs for rank in stats),
        "nonfinite_tokens": sum(rank.nonfinite_tokens for rank in stats),
        "nonfinite_rows": sum(rank.nonfinite_rows for rank in stats),
    }


def _backwards(
    config: MoEConfig, parts: Sequence[Measurement], stats: Sequence[Stats], verdict: GradientVerdict | None
) -> dict[str, Any] | None:
    """Of the backwards, if there were any, and of the calls that kept for them.

    `gflops` counts each product of the forward's twice: gradients go through it to its rows and to its weights.
    `error_shares` are the largest errors, as shares of what they may be.
    """
    measured = [part.backwards for part in parts if part.backwards is not None]
    if not measured:
        return None
    forward_ms = _spread_ms([part.forward_ns for part in measured])
    backward_ms = _spread_ms([part.backward_ns for part in measured])
    flops = 2 * row_flops(config) * sum(rank.received_rows for rank in stats)
    shares = verdict.shares if verdict is not None else {}
    return {
        "forward_ms": forward_ms,
        "backward_ms": backward_ms,
        "tokens_per_s": sum(rank.num_tokens for rank in stats) / (forward_ms["median"] + backward_ms["median"]) * 1e3,
        "gflops": flops / backward_ms["median"] / 1e6,
        "kept_bytes": sum(part.kept_bytes for part in measured),
        "error_shares": {name: share if math.isfinite(share) else None for name, share in shares.items()},
    }


def _judgement(parts: Sequence[Measurement], verdict: Verdict, of_gradients: GradientVerdict | None) -> dict[str, Any]:
    backwards = [part.backwards for part in parts if part.backwards is not None]
    differs = {
        "the calls gave different bits for the same input": [part.y_digests for part in parts],
        "the backwards gave different bits for the same input": [part.digests for part in backwards],
    }
    unlike = [sentence for sentence, of_parts in differs.items() if any(len(set(bits)) > 1 for bits in of_parts)]
    repeatable = not unlike
    failures = verdict.failures + (of_gradients.failures if of_gradients is not None else []) + unlike
    return {
        "max_rel_error": verdict.max_rel_error if math.isfinite(verdict.max_rel_error) else None,
        "tolerance": verdict.tolerance,
        "bitwise_repeatable": repeatable,
        "failures": failures,
        "passed": not failures,
    }


def table(report: dict[str, Any], describe_sizes: str) -> Iterator[str]:
    """The lines that people read; `describe_sizes` is the config in one line."""
    latency, share = report["latency_ms"], report["blas_share"]
    where = {
        "mpi": "processes under mpirun",
        "threads": "threads",
        "virtual": "virtual ranks of one GPU",
        "fibers": "interpreted fibers",
    }[report["transport"]]
    where += f" on {report['hosts']} hosts ({report['netmod']})" if report["hosts"] > 1 else ""
    yield _row(
        "ranks", f"{report['ranks']} as {where}, with {report['processors']} processor blocks and an OS block each"
    )
    yield _row("sizes", describe_sizes)
    rows = f"{report['sent_rows']:,} rows sent, {report['dropped_pairs']:,} pairs dropped"
    yield _row("workload", f"{report['workload']}, {rows}")
    if report["nonfinite_tokens"] or report["nonfinite_rows"]:
        counts = f"{report['nonfinite_tokens']:,} tokens' weights, results of {report['nonfinite_rows']:,} rows"
        yield _row("not finite", counts)
    apart = "" if report["packing"] == PACKINGS[0] else ", each of one source's rows"
    yield _row("padding", f"{report['padded_row_share']:.1%} of the rows in {report['row_tiles']:,} row tiles{apart}")
    spread = f"({latency['min']:.2f} to {latency['max']:.2f})"
    if report["arithmetic"] not in (None, "fma"):
        yield _row("arithmetic", report["arithmetic"])
    yield _row("latency", f"{latency['median']:.2f} ms, median of {report['iterations']} {spread}")
    yield _row("throughput", f"{report['tokens_per_s']:,.0f} tokens/s, {report['gflops']:.1f} GFLOP/s in the experts")
    if share is not None:
        yield _row("plain BLAS", f"{report['blas_gflops']:.1f} GFLOP/s over the same expert GEMMs, as many threads")
        yield _row("share", f"{share:.2f} of plain BLAS, with gate, dispatch and combine")
    if report["backward"] is not None:
        yield from _of_backwards(report)
    yield _row("error", f"{_error(report)} of the largest result (tolerance {report['tolerance']:.1e})")
    yield _row("repeatable", "yes, bit for bit" if report["bitwise_repeatable"] else "no")
    yield _row("", "passed" if report["passed"] else "FAILED: " + "; ".join(report["failures"]))


def _of_backwards(report: dict[str, Any]) -> Iterator[str]:
    found, alone = report["backward"], report["latency_ms"]["median"]
    forward, backward = found["forward_ms"]["median"], found["backward_ms"]["median"]
    kept = f"{found['kept_bytes']:,} bytes kept, saving {report['save']}"
    yield _row("forward", f"{forward:.2f} ms where it keeps, {kept}")
    times = f"{backward / alone:.2f} of the call that keeps nothing, {found['gflops']:.1f} GFLOP/s in the experts"
    yield _row("backward", f"{backward:.2f} ms, {times}")
    yield _row("both", f"{forward + backward:.2f} ms, {found['tokens_per_s']:,.0f} tokens/s")
    shares = {name: math.inf if share is None else share for name, share in found["error_shares"].items()}
    if shares:
        worst = max(shares, key=lambda name: shares[name])
        yield _row("gradients", f"{shares[worst]:.2f} of its bound is the largest error, of {worst}")


def _error(report: dict[str, Any]) -> str:
    return "not finite" if report["max_rel_error"] is None else f"{report['max_rel_error']:.1e}"


def _row(name: str, value: str) -> str:
    return f"{name:12}{value}"
