"""The layer on several ranks under mpirun beside one rank with the same tokens: what 04_beside_torch.py --ranks shows.

Each point is a pair of `flashmoe run`, which split the same workload over their ranks. Pairs go round all numbers of
tokens. `packed` is the padding on one rank, where all rows of an expert share tiles; `row_tiles` are of all ranks, and
one rank has the fewest that there can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from common import Row, flashmoe_run

TOKENS = (8, 32, 256)  # of each rank
ROUNDS = 3
RANK_COLUMNS = {
    "ranks": "d",
    "tokens per rank": "d",
    "ms": ".2f",
    "one_rank_ms": ".2f",
    "ratio": ".2f",
    "padded_row_share": ".1%",
    "packed": ".1%",
    "row_tiles": ".0f",
    "one_rank_row_tiles": "d",
    "blas_share": ".2f",
    "one_rank_blas_share": ".2f",
    "ok": "",
}


def beside_one_rank(ranks: int, iterations: int, smoke: bool) -> list[Row]:
    """One row per number of tokens; a run measures `iterations` calls."""
    how = {"preset": "laptop-tiny", "iterations": 2} if smoke else {"preset": "laptop-gemm", "iterations": iterations}
    many: dict[int, list[Row]] = {tokens: [] for tokens in ((5,) if smoke else TOKENS)}
    one: dict[int, list[Row]] = {tokens: [] for tokens in many}
    for _ in range(1 if smoke else ROUNDS):
        for tokens in many:
            many[tokens].append(flashmoe_run(ranks=ranks, tokens=tokens, **how))
            one[tokens].append(flashmoe_run(ranks=1, tokens=ranks * tokens, **how))
    return [rank_row(ranks, tokens, many[tokens], one[tokens]) for tokens in many]


def rank_row(ranks: int, tokens: int, many: Sequence[Row], one: Sequence[Row]) -> Row:
    """From the reports of all runs; times are medians over runs of each run's median."""
    ms, one_rank_ms = (median(report["latency_ms"]["median"] for report in reports) for reports in (many, one))
    return {
        "ranks": ranks,
        "tokens": tokens,
        "ms": ms,
        "one_rank_ms": one_rank_ms,
        "latency_ms": [report["latency_ms"] for report in many],
        "one_rank_latency_ms": [report["latency_ms"] for report in one],
        "ratio": ms / one_rank_ms,
        "padded_row_share": median(report["padded_row_share"] for report in many),
        "packed": one[0]["padded_row_share"],
        "row_tiles": median(report["row_tiles"] for report in many),
        "one_rank_row_tiles": one[0]["row_tiles"],
        "blas_share": median(report["blas_share"] for report in many),
        "one_rank_blas_share": median(report["blas_share"] for report in one),
        "ok": all(report["passed"] for report in (*many, *one)),
    }
