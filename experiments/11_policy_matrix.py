"""Question: which schedule is fastest where, and where does overlap stop paying?

Command:  python experiments/11_policy_matrix.py [--preset scout|olmoe|deepseek-v3-like|NAME] [--own] [--json FILE]
Expected: a schedule that fuses or overlaps wins every cell, most often MegaMoE's, by a few per cent; between nodes,
          with many experts, one that sends a token to a node once. Bulk kernels and FasterMoE's steps win none.
          FlashMoE beats bulk where its tiles are full, from 8,192 tokens on at the latest; with few rows for each
          (source, expert) padding can cost more than overlap gains. Packed it beats bulk everywhere. That is checked.

All schedules get the same routing of a (hardware, routing, tokens) cell, and the same tiles and rate: schedules are
compared, not kernels. `--own` gives each its own tiles and fitted rate instead, as published systems have them, where
there is one; then nothing is checked. `packed` is FlashMoE with tiles packed over sources, low ones for few rows;
`lean` is bulk with no more kernels than the layer has stages, where Megatron-LM launches 261. So `packed` against
`lean` is what overlap and fusion gain, launches and padding aside.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

from common import Row, parser_of, show, store
from sim_common import PACKED, PUBLISHED, equal_terms, heading, terms_text, world_of

from sim import World, make_knobs, simulate
from sim.policies.bulk import NUM_STAGES

TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
ROUTINGS = ("even", "zipf:1", "hot-rank")
HARDWARE = ("8xH100", "8xH800", "8xA100", "2x8xH100", "8xB200")
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "flashmoe": ("flashmoe", PUBLISHED),
    "packed": ("flashmoe", PACKED),
    "comet": ("comet", {}),
    "megamoe": ("megamoe", {}),
    "nanoflow": ("nanoflow", {}),
    "fastermoe": ("fastermoe", {}),
    "deepep": ("deepep", {}),
    "sonic": ("sonic", {}),
    "bulk": ("bulk", {}),
    "lean": ("bulk", {"num_ops": NUM_STAGES}),
    "t3": ("t3", {}),
    "scmoe": ("scmoe", {}),
}
CANNOT_WIN = {"t3": "needs hardware that no GPU has", "scmoe": "its time has the block's dense work in it"}
PAIRS = (("flashmoe", "bulk"), ("packed", "lean"))


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--preset", default="scout", help="[scout]")
    parser.add_argument("--own", action="store_true", help="each policy's own tiles and fitted rate")
    args = parser.parse_args()
    tokens = (128, 4096) if args.smoke else TOKENS
    points = itertools.product(HARDWARE[:1] if args.smoke else HARDWARE, ROUTINGS, tokens)
    cells = [cell(args.preset, args.own, *point) for point in points]
    show_latencies(cells, f"{args.preset}, {'own tiles and rates' if args.own else terms_text()}")
    for ours, theirs in PAIRS:
        show_pair(cells, ours, theirs, tokens)
    store(({"preset": args.preset, "own": args.own, "simulated": True} | row for row in cells), args.json)
    return 0 if args.own or all(map(holds, cells)) else 1


def cell(preset: str, own: bool, hardware: str, routing: str, tokens: int) -> Row:
    """All schedules in one world; `reasons` says why some have no latency."""
    row: Row = {"hardware": hardware, "routing": routing, "tokens": tokens, "latency_us": {}, "reasons": {}}
    try:
        world = world_of(preset, hardware, tokens, routing)
    except ValueError as error:
        return row | {"reasons": dict.fromkeys(SCHEDULES, str(error)), "winner": "-", "lead": 0.0}
    for name in SCHEDULES:
        try:
            row["latency_us"][name] = latency_us(name, world, own)
        except ValueError as error:
            row["reasons"][name] = str(error)
    first, second = sorted((us, name) for name, us in row["latency_us"].items() if name not in CANNOT_WIN)[:2]
    return row | {"winner": first[1], "lead": second[0] / first[0] - 1}


def holds(row: Row) -> bool:
    """What the docstring expects of a cell."""
    full = row["tokens"] < 8192 or ratio(row, "flashmoe", "bulk") > 1
    return row["winner"] not in ("bulk", "lean", "fastermoe") and full and ratio(row, "packed", "bulk") > 1


def latency_us(name: str, world: World, own: bool) -> float:
    policy, changes = SCHEDULES[name]
    knobs = make_knobs(policy, changes) if own else equal_terms(policy, world, changes)
    return simulate(policy, world, knobs, keep_runs=False).latency_us


# ---- tables


def show_latencies(cells: Sequence[Row], about: str) -> None:
    heading(f"latency in us and the winner's lead over the next; {about}")
    lines = [row | {name: f"{row['latency_us'].get(name, float('nan')):,.0f}" for name in SCHEDULES} for row in cells]
    columns = {"hardware": "", "routing": "", "tokens per GPU": ",d"} | dict.fromkeys(SCHEDULES, "")
    show(lines, columns | {"winner": "", "lead": ".0%"})
    for name, reason in CANNOT_WIN.items():
        print(f"{name} cannot win: {reason}")
    for reason in sorted({reason for row in cells for reason in row["reasons"].values()}):
        print(f"nan: {reason}")


def show_pair(cells: Sequence[Row], ours: str, theirs: str, tokens: Sequence[int]) -> None:
    """How many times as long the bulk schedule takes, and where that is less than once."""
    heading(f"latency of {theirs} / latency of {ours}, by tokens per GPU; below 1 overlap does not pay")
    lines: list[Row] = []
    for (hardware, routing), group in itertools.groupby(cells, lambda row: (row["hardware"], row["routing"])):
        ratios = {row["tokens"]: ratio(row, ours, theirs) for row in group}
        lost = [str(count) for count, value in ratios.items() if value < 1]
        lines.append({"hardware": hardware, "routing": routing, "lost at": ""} | {str(n): r for n, r in ratios.items()}
                     | {"lost": ", ".join(lost) or "nowhere"})  # fmt: skip
    show(lines, {"hardware": "", "routing": ""} | dict.fromkeys(map(str, tokens), ".2f") | {"lost at": ""})


def ratio(row: Row, ours: str, theirs: str) -> float:
    return row["latency_us"].get(theirs, float("nan")) / row["latency_us"].get(ours, float("nan"))


if __name__ == "__main__":
    sys.exit(main())
