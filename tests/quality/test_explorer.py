"""The explorer finds every planted bug, by a report of a kind that fits it, within a few seeds of a few worlds."""

from dataclasses import replace

import pytest

from flashmoe_numba.explore.hunt import find, searches
from flashmoe_numba.explore.plants import PLANTS
from flashmoe_numba.explore.search import Explorer, watched_kernel

NUM_SEEDS = 10
STRATEGIES = ("random", "pct")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of whatever a bug computes
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found_by_a_report_that_fits(name):
    runs, seen = find(name, STRATEGIES, range(NUM_SEEDS))
    assert runs > 0, f"{name} should be found by {sorted(PLANTS[name].found_by)}, but reports were {seen or 'none'}"


@pytest.mark.parametrize("name", [name for name, plant in PLANTS.items() if plant.weak])
def test_sequentially_consistent_words_hide_it(name):
    with watched_kernel(name) as kernel:
        for search in searches(name, STRATEGIES):
            explorer = Explorer(replace(search, weak=False), kernel)
            for seed in range(2):
                assert explorer.run(seed).reports == [], f"{search}, seed {seed}"


def test_the_kernel_itself_passes():
    with watched_kernel(None) as kernel:
        for search in searches(None, STRATEGIES):
            explorer = Explorer(search, kernel)
            for seed in range(2):
                assert explorer.run(seed).reports == [], f"{search}, seed {seed}"
