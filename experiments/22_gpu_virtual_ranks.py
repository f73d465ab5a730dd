"""Question: what does it cost to cut one GPU into eight ranks, with as many tokens together as before?

Command:  python experiments/22_gpu_virtual_ranks.py --json experiments/results/virtual_ranks.jsonl
          [--shapes scout,olmoe,qwen3,paper] [--tokens 1024,4096,16384] [--ranks 8] [--repeats 20] [--dtype float16]
Expected: at most 10 % more time than one rank. What is added: packets are of one (source, expert), so there are eight
          times as many, each with an eighth of the rows, and short ones are padded to 16 rows; eight OS blocks in place
          of one. Every row ok: the results are those of one rank, bit for bit, and a sample is checked with float64.

Both layers exist side by side and are called by turns. Times as in 20_gpu_roof.py.
"""

from __future__ import annotations

import sys

import numpy as np
from common import Row, show, store
from gpu_common import (
    Clock,
    check_sample,
    facts,
    gpu_layer,
    gpu_parser,
    integers,
    leave_without_gpu,
    random_x,
    shares,
    study_configs,
    to_gpu,
)

from reference import MoEConfig, Weights

COLUMNS = {
    "shape": "",
    "tokens": "d",
    "ranks": "d",
    "one_ms": ".3f",
    "ranks_ms": ".3f",
    "ratio": ".3f",
    "one_padded_rows": "d",
    "ranks_padded_rows": "d",
    "error": ".1e",
    "ok": "",
}


def main() -> int:
    parser = gpu_parser(__doc__)
    parser.add_argument("--tokens", default="1024,4096,16384", help="of all ranks together [1024,4096,16384]")
    parser.add_argument("--ranks", type=int, default=8, help="[8]")
    args = parser.parse_args()
    leave_without_gpu(args)
    if args.smoke:
        args.tokens, args.ranks, args.repeats = "64", 4, 2
    tokens, rows, clock = integers(args.tokens), [], Clock()
    one, many = (study_configs(args, max(tokens), num_ranks) for num_ranks in (1, args.ranks))
    for name in one:
        found = compare(name, one[name], many[name], tokens, clock, args)
        show(found, COLUMNS)
        store(found, args.json)
        rows += found
    return 0 if all(row["ok"] for row in rows) else 1


def compare(
    name: str, one: MoEConfig, many: MoEConfig, token_counts: list[int], clock: Clock, args: object
) -> list[Row]:
    """One row per number of tokens."""
    import cupy

    weights, x, rows = Weights.random(one), random_x(one), []
    on_gpu = to_gpu(x)
    with gpu_layer(one, weights, args) as layer, gpu_layer(many, weights, args) as cut:
        for tokens in token_counts:
            whole, parts = [on_gpu[:tokens]], shares(on_gpu, many.num_ranks, tokens)
            y, y_cut = layer(whole), cut(parts)
            layer.synchronize()
            cut.synchronize()
            same = cupy.concatenate(y_cut).tobytes() == y[0].tobytes()
            error, limit = check_sample(one, weights, x[:tokens], y, layer, args)
            padded = [sum(stats.padded_rows for stats in each.stats) for each in (layer, cut)]
            variants = {"one": lambda whole=whole: layer(whole), "ranks": lambda parts=parts: cut(parts)}
            times = clock.measure(variants, args.repeats)
            row = {
                "shape": name,
                "tokens": tokens,
                "ranks": many.num_ranks,
                "one_ms": times["one"]["ms"],
                "ranks_ms": times["ranks"]["ms"],
                "ratio": times["ranks"]["ms"] / times["one"]["ms"],
                "one_padded_rows": padded[0],
                "ranks_padded_rows": padded[1],
                "error": error,
                "tolerance": limit,
                "same_bits": same,
                "ok": bool(same and np.isfinite(error) and error <= limit),
                "times": times,
            }
            rows.append(row | facts(args))
    return rows


if __name__ == "__main__":
    sys.exit(main())
