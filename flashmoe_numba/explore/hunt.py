"""How many runs it takes to find a planted bug: the same small worlds, in turn, until a report fits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from reference import MoEConfig

from .plants import PLANTS
from .search import Explorer, Search, watched_kernel
from .spec import WorldSpec

TINY: dict[str, Any] = dict(
    num_ranks=2, num_tokens=5, hidden=5, ffn=6, num_experts=6, num_topk=3, gated=True, activation="silu",
    tile_m=4, tile_m_min=2, tile_n=4, token_block=2, renormalize=False,
)  # fmt: skip
LANES = WorldSpec(config=MoEConfig(**TINY | dict(capacity=3)), lanes=2, epochs=3)
DROPS = WorldSpec(config=MoEConfig(**TINY | dict(num_ranks=3, capacity=1, token_block=1)), epochs=4, data_seed=2)
TALL = WorldSpec(config=MoEConfig(**TINY | dict(num_experts=4, num_tokens=9, renormalize=True)), lanes=3, epochs=2)
SMALL = WorldSpec(config=MoEConfig(**TINY | dict(num_ranks=3, num_tokens=2, num_experts=3, num_topk=1)))
WORLDS = (LANES, DROPS, TALL, replace(LANES, leavers=(0, 1)), replace(SMALL, leavers=(0, 1, 2)))


def searches(plant: str | None, strategies: Sequence[str]) -> list[Search]:
    """World by world, each under every strategy."""
    return [Search(spec=spec, strategy=strategy, plant=plant) for spec in WORLDS for strategy in strategies]


def find(plant: str, strategies: Sequence[str], seeds: Sequence[int]) -> tuple[int, set[str]]:
    """(runs until a report of a kind that fits the plant, kinds reported till then); -1 runs if none did.

    A seed is tried in every search before the next one.
    """
    seen: set[str] = set()
    with watched_kernel(plant) as kernel:
        explorer = cache(lambda search: Explorer(search, kernel))
        for run, (seed, search) in enumerate(itertools.product(seeds, searches(plant, strategies)), start=1):
            seen |= {report.kind for report in explorer(search).run(seed).reports}
            if seen & set(PLANTS[plant].found_by):
                return run, seen
    return -1, seen
