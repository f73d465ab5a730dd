"""Question: what does a small batch cost in padded rows, and what does each remedy gain?

Command:  python experiments/12_small_batches.py [--hardware NAME] [--json FILE]
Expected: with one tile height for each (source, expert), latency is flat from 32 to 512 tokens, within 15 %. Packing
          rows over sources gains most (at 64 tokens more than 2.5 times), a ladder of heights alone less, because the
          tiles of every source still read the expert's weights, from the cache or even from memory; with both, what is
          left at few tokens is reading the weights once, and nothing is faster than that. Rows packed as they arrive,
          as the kernel does it, gain as much without a word about counts before: with a ladder at most 1.15 times the
          time of those whose counts were known; where idle processors take rests after 2 us, 1.8 times. Rounding to
          whole tiles leaves no rows of so few. That is checked.

"packed" are rows whose counts all ranks have told each other, without the time of telling. "arrived" are those that
have come: a full tile is cut at once, a rest when its expert's last packet is here, or when processors are idle and no
packet of the expert came for 10 us, as in the kernel ("arrived+2us": for so long). Who is idle at once then multiplies
the rows of the first sources alone, and reads the weights again for the others.

Tiles of 128 rows for each (source, expert) pay for 128 rows where one came: that is the padding floor. Whatever the
tiles, an expert that gets a row is read from memory once: that is the weights floor. Rounding changes the routing
itself, by whole tiles: `sent` says how many rows are left of it. All have tiles 128 wide, as FlashMoE's and MegaMoE's
are, and the same rate.
"""

from __future__ import annotations

import sys
from typing import Any

from common import Row, parser_of, show, store
from sim_common import RATE, TILE_M, equal_terms, heading, world_of

from sim import World, report, round_tokens, simulate

PRESETS = ("scout", "olmoe")
TOKENS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ROUTING = "uniform"
TILES = {"tile_n": 128}
NARROW = TILES | {"packing": "per_source"}
PACKED = TILES | {"packing": "per_expert"}
ARRIVED = TILES | {"packing": "arrived"}
REMEDIES: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("flashmoe", NARROW),
    "ladder": ("flashmoe", NARROW | {"ladder": True}),
    "packed": ("flashmoe", PACKED),
    "packed+ladder": ("flashmoe", PACKED | {"ladder": True}),
    "packed+rounded": ("flashmoe", PACKED),
    "arrived": ("flashmoe", ARRIVED),
    "arrived+ladder": ("flashmoe", ARRIVED | {"ladder": True}),
    "arrived+2us": ("flashmoe", ARRIVED | {"ladder": True, "settle_ns": 2000}),
    "megamoe": ("megamoe", TILES),
}


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--hardware", default="8xH100", help="[8xH100]")
    args = parser.parse_args()
    rows = []
    for preset in PRESETS[:1] if args.smoke else PRESETS:
        for tokens in (32, 64, 512) if args.smoke else TOKENS:
            rows += point(preset, args.hardware, tokens)
        show_preset([row for row in rows if row["preset"] == preset], preset, args.hardware)
    store(rows, args.json)
    return 0 if holds(rows) else 1


def point(preset: str, hardware: str, tokens: int) -> list[Row]:
    """A row for each remedy."""
    world = world_of(preset, hardware, tokens, ROUTING)
    rows = []
    for name, (policy, changes) in REMEDIES.items():
        rounded = round_tokens(world.routing, TILE_M) if name == "packed+rounded" else world.routing
        mine = world_of(preset, hardware, tokens, rounded)
        told = report(simulate(policy, mine, equal_terms(policy, mine, changes)))
        rows.append({
            "preset": preset, "hardware": hardware, "tokens": tokens, "remedy": name, "simulated": True,
            "latency_us": told.latency_us, "weights_us": weights_us(world),
            "padded": 1 - told.useful / told.tensor_busy, "sent": float(mine.rows.sum() / world.rows.sum()),
        })  # fmt: skip
    return rows


def holds(rows: list[Row]) -> bool:
    """What the docstring expects."""
    facts = [row["latency_us"] >= row["weights_us"] for row in rows if row["remedy"] != "packed+rounded"]
    facts += [row["sent"] == 0 for row in rows if row["remedy"] == "packed+rounded" and row["tokens"] <= 32]
    for preset in {row["preset"] for row in rows}:
        times = {(row["remedy"], row["tokens"]): row["latency_us"] for row in rows if row["preset"] == preset}
        flat = [us for (remedy, tokens), us in times.items() if remedy == "fixed" and 32 <= tokens <= 512]
        facts.append(max(flat) < 1.15 * min(flat))
        facts.append(times["fixed", 64] > 2.5 * times["packed", 64])
        for tokens in {tokens for _, tokens in times}:
            known = times["packed+ladder", tokens]
            facts.append(times["arrived+ladder", tokens] < 1.15 * known)
            facts.append(times["arrived+2us", tokens] < 1.8 * known)
        facts.append(times["fixed", 64] > times["ladder", 64] > times["packed", 64] >= times["packed+ladder", 64])
    return all(facts)


def weights_us(world: World) -> float:
    """Reading the experts of the busiest rank that get rows, once, at the bandwidth that streaming reaches."""
    used = (world.routing.counts.sum(axis=0) > 0).reshape(world.num_ranks, -1).sum(axis=1).max()
    nbytes = world.weight_bytes / world.experts_per_rank * int(used)
    return float(nbytes / (world.hardware.hbm_gbps * world.hardware.hbm_achieved) / 1e3)


def show_preset(rows: list[Row], preset: str, hardware: str) -> None:
    about = f"{preset} on {hardware}, {ROUTING} routing, tiles {TILE_M} x 128, {RATE:.0%} of the tensor peak"
    heading(f"latency in us, in brackets the share of operations that is padding; {about}")
    lines: dict[int, Row] = {}
    for row in rows:
        line = lines.setdefault(row["tokens"], {"tokens": row["tokens"], "weights": row["weights_us"]})
        line[row["remedy"]] = f"{row['latency_us']:,.0f} ({row['padded']:.0%})"
        line |= {"sent": row["sent"]} if row["remedy"] == "packed+rounded" else {}
    columns = {"tokens per GPU": ",d", "weights floor": ",.0f"} | dict.fromkeys(REMEDIES, "")
    show(list(lines.values()), columns | {"sent when rounded": ".2f"})


if __name__ == "__main__":
    sys.exit(main())
