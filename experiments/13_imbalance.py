"""Question: what does uneven load of the experts cost, and what do placement and replicas give back, for which memory?

Command:  python experiments/13_imbalance.py [--preset NAME] [--tokens N] [--json FILE]
Expected: with one rank nearly twice as busy as the mean, latency is half as much again as with even routing or more,
          with overlap as without. Placement alone levels one hot rank; a few replicas, 1/16 of the experts and of the
          memory for weights, level zipf:1.5, and more gain little. But FlashMoE with tiles per source stays a third
          above even at zipf:1.5 with level ranks: unpopular experts have packets that do not fill a tile. Packed tiles
          do not have that. That is checked.

`blocks` is the usual placement, expert i on rank i // experts per rank; `placed` moves experts by their load
(`sim.world.placement`); `+N` adds N copies of busy ones, over all ranks. Placement knows the load of the very batch; a
real one knows those of earlier batches. Equal terms (see sim_common). `packed` is FlashMoE with tiles over all sources.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from common import Row, parser_of, show, store
from sim_common import PACKED, PUBLISHED, equal_terms, heading, terms_text, world_of

from sim import World, balance, simulate

ROUTINGS = (*(f"zipf:{exponent:g}" for exponent in (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)), "hot-rank")
SHARES = (0, 1 / 16, 1 / 8, 1 / 4)  # replicas per expert
HARDWARE = "8xH100"
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "flashmoe": ("flashmoe", PUBLISHED),
    "packed": ("flashmoe", PACKED),
    "bulk": ("bulk", {}),
}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--preset", default="deepseek-v3-like", help="[deepseek-v3-like]")
    parser.add_argument("--tokens", type=int, default=4096, help="per GPU [4096]")
    args = parser.parse_args()
    even = latencies(world_of(args.preset, HARDWARE, args.tokens, "even"))
    routings, shares = (ROUTINGS[-2:], SHARES[:2]) if args.smoke else (ROUTINGS, SHARES)
    rows = [row for name in routings for row in routed(args.preset, args.tokens, name, shares, even)]
    show_rows(rows, f"{args.preset} on {HARDWARE}, {args.tokens:,} tokens per GPU, {terms_text()}")
    store(rows, args.json)
    return 0 if holds(rows) else 1


def latencies(world: World) -> dict[str, float]:
    """Of each schedule, in us."""
    return {
        name: simulate(policy, world, equal_terms(policy, world, changes), keep_runs=False).latency_us
        for name, (policy, changes) in SCHEDULES.items()
    }


def routed(preset: str, tokens: int, name: str, shares: Sequence[float], even: dict[str, float]) -> list[Row]:
    """A row for each placement of one routing, with `shares` of replicas; `even` has the latencies to compare with."""
    blocks = world_of(preset, HARDWARE, tokens, name)
    counts = [int(blocks.config.num_experts * share) for share in shares]
    routings = {"blocks": blocks.routing} | {f"placed +{count}": balance(blocks.routing, count) for count in counts}
    rows = []
    for placement, routing in routings.items():
        world = world_of(preset, HARDWARE, tokens, routing)
        latency_us = latencies(world)
        rows.append({
            "preset": preset, "hardware": HARDWARE, "tokens": tokens, "simulated": True, "routing": name,
            "placement": placement, "load": float(world.rows.max() / world.rows.mean()),
            "weights_gb": world.weight_bytes / 1e9, "latency_us": latency_us,
            "times_even": {schedule: us / even[schedule] for schedule, us in latency_us.items()},
        })  # fmt: skip
    return rows


def show_rows(rows: list[Row], about: str) -> None:
    heading(f"latency in us, in brackets as a multiple of that with even routing; {about}")
    lines = [row | {name: f"{us:,.0f} ({row['times_even'][name]:.2f})" for name, us in row["latency_us"].items()}
             for row in rows]  # fmt: skip
    show(lines, {"routing": "", "placement": "", "load max/mean": ".2f", "weights_gb per rank": ".2f"}
         | dict.fromkeys(SCHEDULES, ""))  # fmt: skip


def holds(rows: list[Row]) -> bool:
    """What the docstring expects, of the last two routings."""
    blocks, placed, few, *_ = (row for row in rows if row["routing"] == "zipf:1.5")
    hot, level, *_ = (row for row in rows if row["routing"] == "hot-rank")
    times = [row["times_even"] for row in (blocks, few, hot, level)]
    return (
        min(hot["load"], blocks["load"]) > 1.5 and min(*times[0].values(), *times[2].values()) > 1.5
        and max(level["load"], few["load"]) < 1.02 < placed["load"]
        and max(times[3].values()) < 1.15
        and max(times[1]["packed"], times[1]["bulk"]) < 1.1 and times[1]["flashmoe"] > 1.3
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
