"""What `flashmoe sim` prints: the tables of reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reference import MoEConfig
from sim.policies import SAME

from .beside import notes
from .columns import TABLES, Rows, table_lines, unfitted

TERMS = {
    "system": "terms system: each policy's own tiles, and the rate fitted to its system",
    "schedule": "terms schedule: tiles of {tile_m} x {tile_n} and a rate of {rate:.3f} for all".format_map(SAME),
}


PASSES = {  # how a header begins
    "forward": "",
    "backward": "backward; ",
    "training": "training: forward, backward and the sum of dense gradients over ranks; ",
}


def tables(about: Mapping[str, Any], config: MoEConfig, rows: Rows) -> Iterator[str]:
    """Lines for people; the rows, those of the JSON, differ in policy and tokens.

    `about` has what they share: "preset", "seeds" in words, "terms", "set".
    """
    first = rows[0]
    yield f"simulated on {first['hardware']}: {about['preset']} on {first['ranks']} ranks, {_sizes(config)}"
    limit = "" if config.capacity is not None else ", no capacity"
    yield f"{PASSES[first['passes']]}{first['precision']}, routing {first['routing']}, {about['seeds']}{limit}"
    yield TERMS[about["terms"]] + (f"; set {', '.join(about['set'])}" if about["set"] else "")
    links = {"NVLink": first["node_link"], "NIC": first["network_link"]}
    for columns in TABLES:
        lines = [*table_lines(columns, rows, links)]
        yield from ["", *lines] if lines else []
    if any(map(unfitted, rows)):
        yield "* not fitted to measurements of this policy on this GPU"
    if first["passes"] != "forward":
        yield "rates are those of forwards: no fit has seen a backward"
    yield from notes(rows)


def _sizes(config: MoEConfig) -> str:
    gated = " gated" if config.expert_kind.gated else ""
    parts = [f"hidden {config.hidden}", f"ffn {config.ffn}{gated}", f"{config.num_experts} experts"]
    parts += [f"{config.num_zero} zero experts"] if config.num_zero else []
    parts += [f"shared ffn {config.shared_ffn}"] if config.shared_ffn else []
    return ", ".join([*parts, f"top-{config.num_topk}"])
