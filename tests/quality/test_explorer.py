"""The explorer finds every planted bug, by a report of a kind that fits it, within a few seeds of a few worlds."""

import itertools
from dataclasses import replace
from functools import cache

import pytest

from flashmoe_numba.explore.plants import PLANTS
from flashmoe_numba.explore.search import Explorer, Search, watched_kernel
from flashmoe_numba.explore.world import WorldSpec
from reference import MoEConfig

NUM_SEEDS = 10
TINY = dict(
    num_ranks=2, num_tokens=5, hidden=5, ffn=6, num_experts=6, num_topk=3, gated=True, activation="silu",
    tile_m=4, tile_m_min=2, tile_n=4, token_block=2, renormalize=False,
)  # fmt: skip
LANES = WorldSpec(config=MoEConfig(**TINY | dict(capacity=3)), lanes=2, epochs=3)
DROPS = WorldSpec(config=MoEConfig(**TINY | dict(num_ranks=3, capacity=1, token_block=1)), epochs=4, data_seed=2)
TALL = WorldSpec(config=MoEConfig(**TINY | dict(num_experts=4, num_tokens=9, renormalize=True)), lanes=3, epochs=2)
WORLDS = (LANES, DROPS, TALL, replace(LANES, leaver=1))


def searches(plant):
    """World by world under two strategies."""
    return [Search(spec=spec, strategy=strategy, plant=plant) for spec in WORLDS for strategy in ("random", "pct")]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of whatever a bug computes
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found_by_a_report_that_fits(name):
    seen, fits = set(), set(PLANTS[name].found_by)
    with watched_kernel(name) as kernel:
        explorer = cache(lambda search: Explorer(search, kernel))
        for seed, search in itertools.product(range(NUM_SEEDS), searches(name)):
            seen |= {report.kind for report in explorer(search).run(seed).reports}
            if seen & fits:
                return
    pytest.fail(f"{name} should be found by {sorted(fits)}, but reports were {seen or 'none'}")


def test_the_kernel_itself_passes():
    with watched_kernel(None) as kernel:
        for search in searches(None):
            explorer = Explorer(search, kernel)
            for seed in range(2):
                assert explorer.run(seed).reports == [], f"{search}, seed {seed}"
