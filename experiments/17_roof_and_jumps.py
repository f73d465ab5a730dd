"""Question: is any simulation faster than its machine can be, and does any jump where a layer hardly grows?

Command:  python experiments/17_roof_and_jumps.py [--model NAME] [--json FILE]
Expected: over all cells (models, machines, tokens, routings, policies) no latency is below `sim.drafting.roof`: weights
          of experts with rows once over the memory, products of real rows over the tensor peak, rows over the links.
          That is checked. With up to 16 tokens per GPU, 1 % more columns of the experts cost at most 3 % in all but
          some 10 of 1,000 cells, which are counted.

Every policy has its own tiles and fitted numbers, bfloat16. Cells that a machine's memory cannot hold are left out.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from statistics import median

from common import Row, parser_of, show, store
from sim_common import PRECISION, heading

from sim import POLICY_NAMES, Scenario, World, load_hardware, load_preset, simulate
from sim.drafting.roof import roof_ns

MODELS = ("llama-4-scout", "olmoe-1b-7b", "deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b")
MACHINES = ("8xH100", "8xH20", "8xA100", "8xB200", "8xGB300")
TOKENS = (1, 16, 256)
DECODE = 16
ROUTINGS = ("uniform", "zipf:1")
MOST_JUMP = 1.03
FORMATS = {
    "policy": "",
    "cells": "",
    "lowest": ".2f",
    "median": ".2f",
    "decode median": ".2f",
    "jump %": ".1f",
    "jumps": "",
}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--model", choices=MODELS, action="append", help="this one only, may be given again [all]")
    args = parser.parse_args()
    cells = itertools.product(args.model or MODELS, MACHINES, TOKENS, ROUTINGS)
    if args.smoke:
        cells = itertools.product(MODELS[1:2], MACHINES[:1], TOKENS[:1], ROUTINGS[:1])
    rows = [row for cell in cells for row in measured(*cell)]
    heading(f"{len(rows)} cells")
    show(summary(rows), FORMATS)
    store(rows, args.json)
    return 0 if all(row["over_roof"] >= 1 for row in rows) else 1


def measured(model: str, machine: str, tokens: int, routing: str) -> Iterator[Row]:
    """A row for each policy, none if the machine cannot hold the layer."""
    try:
        world, wider = (world_of(model, machine, tokens, routing, extra) for extra in (0, 1))
    except ValueError as error:
        print(f"left out: {model} on {machine}: {error}", file=sys.stderr)
        return
    roof = roof_ns(world)
    for policy in POLICY_NAMES:
        latency = simulate(policy, world, keep_runs=False).latency_us
        grown = simulate(policy, wider, keep_runs=False).latency_us if tokens <= DECODE else latency
        yield {
            "policy": policy, "model": model, "machine": machine, "tokens": tokens, "routing": routing,
            "latency_us": latency, "bound": max(roof, key=lambda name: roof[name]),
            "over_roof": 1000 * latency / max(roof.values()), "jump": grown / latency,
        }  # fmt: skip


def world_of(model: str, machine: str, tokens: int, routing: str, percent: int) -> World:
    """The model's layer with experts wider by so many percent."""
    hardware = load_hardware(machine)
    config = load_preset(model, num_ranks=hardware.num_gpus, num_tokens=tokens)
    config = replace(config, ffn=config.ffn + -(-config.ffn * percent // 100), shared_ffn=0)
    return Scenario(config=config, hardware=hardware, routing=routing, precision=PRECISION).make()


def summary(rows: list[Row]) -> list[Row]:
    """By policy: latency over the roof, lowest and median, the largest jump, and how many are large."""
    found: list[Row] = []
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        ratios = [row["over_roof"] for row in own]
        found.append(
            {
                "policy": policy,
                "cells": len(own),
                "lowest": min(ratios),
                "median": median(ratios),
                "decode": median(row["over_roof"] for row in own if row["tokens"] <= DECODE),
                "jump": 100 * (max(row["jump"] for row in own) - 1),
                "jumps": sum(row["jump"] > MOST_JUMP for row in own),
            }
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
