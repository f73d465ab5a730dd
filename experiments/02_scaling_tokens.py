"""Question: how do time and speed depend on the number of tokens, and what does a call cost that has next to none?

Command:  python experiments/02_scaling_tokens.py [--preset NAME] [--repeats N]
Expected: latency is flat for the first few tokens (a call's fixed cost, and each expert's weights are read once), then
          grows in proportion; the share of plain BLAS rises towards the value of `flashmoe run`. Whatever the batch, a
          token's result has the same bits: that is checked.

All ranks are threads of this process. One layer object makes all calls, which is what it is for: token counts change
from call to call. Repeats go round all counts, so that a slow minute of the machine hits all alike; medians are shown.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from common import Row, parser_of, show, store
from threadpoolctl import ThreadpoolController

from flashmoe_numba import FlashMoE
from flashmoe_numba.bench.yardstick import Yardstick
from flashmoe_numba.processes.cores import default_processors
from reference import MoEConfig, Weights, load_preset, make_workload
from reference.plan import row_flops

SETTLE_S = 0.15  # see flashmoe_numba/bench/measure.py
COLUMNS = {
    "tokens per rank": "d",
    "latency_ms": ".2f",
    "tokens_per_s": ",.0f",
    "gflops": ".1f",
    "blas_share": ".2f",
    "padded_row_share": ".1%",
    "ok": "",
}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--preset", default="laptop-text", help="[laptop-text]")
    parser.add_argument("--repeats", type=int, default=9, help="measured calls per number of tokens [9]")
    args = parser.parse_args()
    config = load_preset("laptop-tiny" if args.smoke else args.preset)
    rows = sweep(config, 2 if args.smoke else args.repeats)
    show(rows, COLUMNS)
    store(rows, args.json)
    return 0 if all(row["ok"] for row in rows) else 1


def sweep(config: MoEConfig, repeats: int) -> list[Row]:
    """One row per number of tokens."""
    weights = Weights.random(config)
    x = make_workload("text", config).x
    threads = min(default_processors(1), config.num_ranks * default_processors(config.num_ranks))
    with FlashMoE(config, weights) as layer, ThreadpoolController().limit(limits=threads):
        full = layer(x)
        points = [Point(config, layer, weights, [part[:tokens] for part in x]) for tokens in token_counts(config)]
        for _ in range(repeats):
            for point in points:
                point.measure(layer)
    return [point.row(full) for point in points]


def token_counts(config: MoEConfig) -> list[int]:
    """Powers of two up to the most that the layer takes."""
    return sorted({min(2**i, config.num_tokens) for i in range(config.num_tokens.bit_length() + 1)})


class Point:
    """Calls with one number of tokens per rank, beside the same expert GEMMs in plain BLAS."""

    def __init__(self, config: MoEConfig, layer: FlashMoE, weights: Weights, x: list[np.ndarray]) -> None:
        self._config, self._x = config, x
        self._y = layer(x)
        self._stats = layer.stats
        rows = [rows for stats in self._stats for rows in stats.rows_per_expert]
        self._yardstick = Yardstick(config, weights, rows)
        self._latency_ns: list[int] = []
        self._blas_ns: list[int] = []
        self._repeatable = True

    def measure(self, layer: FlashMoE) -> None:
        time.sleep(SETTLE_S)
        start = time.perf_counter_ns()
        y = layer(self._x)
        self._latency_ns.append(time.perf_counter_ns() - start)
        self._repeatable &= same_bits(y, self._y)
        self._blas_ns.append(self._yardstick.run(lambda: None))

    def row(self, full: list[np.ndarray]) -> Row:
        """Medians, and whether each token's result is that of the full batch `full`."""
        received = sum(stats.received_rows for stats in self._stats)
        padded = sum(stats.padded_rows for stats in self._stats)
        latency_ns, blas_ns = float(np.median(self._latency_ns)), float(np.median(self._blas_ns))
        tokens = len(self._x[0])
        return {
            "tokens": tokens,
            "ranks": self._config.num_ranks,
            "latency_ms": latency_ns / 1e6,
            "tokens_per_s": tokens * self._config.num_ranks / latency_ns * 1e9,
            "gflops": received * row_flops(self._config) / latency_ns,
            "blas_share": blas_ns / latency_ns,
            "padded_row_share": 1 - received / padded,
            "repeats": len(self._latency_ns),
            "ok": self._repeatable and same_bits(self._y, [part[:tokens] for part in full]),
        }


def same_bits(y: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(y, other, strict=True))


if __name__ == "__main__":
    sys.exit(main())
