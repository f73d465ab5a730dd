"""Question: what does leaving the node cost, and which schedule suffers least?

Command:  python experiments/14_nodes.py [--preset NAME] [--tokens N] [--json FILE]
Expected: one NIC carries an eighth of what NVLink does, so schedules that send a row to each expert wait for it,
          overlap or not: their latency is at least the bytes of one NIC over its rate. DeepEP and COMET send a token to
          a node once; one of them is the fastest on more than one node, and DeepEP with two micro-batches grows least.
          In one NVLink domain of 16, nobody grows by more than a tenth. That is checked.

A GPU has as many tokens, and as many rows to multiply, on any number of nodes; the experts are divided among more GPUs.
So what grows is communication: NVLink within a node, one 400 Gb/s NIC for each GPU between nodes. 16xGB200 is one
NVLink domain, to be compared with 2x8xB200. Equal terms (see sim_common), routing uniform.
"""

from __future__ import annotations

import sys
from typing import Any

from common import Row, parser_of, show, store
from sim_common import PACKED, PUBLISHED, equal_terms, heading, terms_text, world_of

from sim import report, simulate

HARDWARE = ("8xH100", "2x8xH100", "4x8xH100", "8xB200", "2x8xB200", "16xGB200")
ONE_NODE = {"2x8xH100": "8xH100", "4x8xH100": "8xH100", "2x8xB200": "8xB200", "16xGB200": "8xB200"}
SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "flashmoe": ("flashmoe", PUBLISHED),
    "packed": ("flashmoe", PACKED),
    "megamoe": ("megamoe", {}),
    "deepep": ("deepep", {}),
    "deepep x2": ("deepep", {"micro_batches": 2}),
    "comet": ("comet", {}),
    "fastermoe": ("fastermoe", {}),
    "bulk": ("bulk", {}),
}
ONCE_PER_NODE = ("deepep", "deepep x2", "comet")


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--preset", default="deepseek-v3-like", help="[deepseek-v3-like]")
    parser.add_argument("--tokens", type=int, default=4096, help="per GPU [4096]")
    args = parser.parse_args()
    tokens = 2048 if args.smoke else args.tokens
    rows: list[Row] = []
    for hardware in HARDWARE[:2] if args.smoke else HARDWARE:
        rows += machine(args.preset, hardware, tokens, rows)
    heading(f"{args.preset}, {tokens:,} tokens per GPU, uniform routing, {terms_text()}")
    show(rows, {"hardware": "", "schedule": "", "latency_us": ",.0f", "times one node": ".2f",
                "exposed_us": ",.0f", "exposed share": ".0%", "nvlink_mb": ",.0f", "nic_mb": ",.0f"})  # fmt: skip
    store(rows, args.json)
    return 0 if all(holds([row for row in rows if row["hardware"] == name]) for name in ONE_NODE) else 1


def machine(preset: str, hardware: str, tokens: int, before: list[Row]) -> list[Row]:
    """A row for each schedule; `before` has those of one node."""
    world = world_of(preset, hardware, tokens, "uniform")
    rows = []
    for name, (policy, changes) in SCHEDULES.items():
        told = report(simulate(policy, world, equal_terms(policy, world, changes)))
        base = [row for row in before if (row["hardware"], row["schedule"]) == (ONE_NODE.get(hardware), name)]
        rows.append({
            "preset": preset, "hardware": hardware, "tokens": tokens, "schedule": name, "simulated": True,
            "latency_us": told.latency_us, "times": told.latency_us / base[0]["latency_us"] if base else 1.0,
            "exposed_us": told.exposed_communication_us, "exposed": told.exposed_communication_us / told.latency_us,
            "nvlink_mb": told.nvlink_bytes_max / 1e6, "nic_mb": told.nic_bytes_max / 1e6,
            "nic_us": told.nic_bytes_max / world.hardware.nic_gbps / 1e3,
        })  # fmt: skip
    return rows


def holds(rows: list[Row]) -> bool:
    """What the docstring expects, of the schedules on one machine of more than one node, or one large domain."""
    if not any(row["nic_mb"] for row in rows):
        return all(row["times"] < 1.1 for row in rows)
    bounded = all(row["latency_us"] >= row["nic_us"] for row in rows)
    fastest, steadiest = (min(rows, key=lambda row: row[key])["schedule"] for key in ("latency_us", "times"))
    return bounded and fastest in ONCE_PER_NODE and steadiest == "deepep x2"


if __name__ == "__main__":
    sys.exit(main())
