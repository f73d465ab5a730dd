"""The explorer finds every planted bug, by a report that fits it, within a few seeds of the world that it names."""

from dataclasses import replace

import pytest

from flashmoe_numba.explore.hunt import find, searches
from flashmoe_numba.explore.plants import PLANTS
from flashmoe_numba.explore.search import Explorer, watched_kernel
from flashmoe_numba.explore.worlds import WORLDS

NUM_SEEDS = 40
STRATEGIES = ("random", "pct")
STRICT_WORLDS = ("plain", "odd lanes")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of whatever a bug computes
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_bug_is_found_by_a_report_that_fits(name):
    world = PLANTS[name].world
    runs, seen = find(name, [(each, s) for s in range(NUM_SEEDS) for each in searches(name, [world], STRATEGIES)])
    wanted = sorted(PLANTS[name].found_by)
    assert runs > 0, f"{name} should be found in {world} by {wanted}, but reports were {seen or 'none'}"


@pytest.mark.parametrize("name", [name for name, plant in PLANTS.items() if plant.weak])
def test_sequentially_consistent_words_hide_it(name):
    with watched_kernel(name) as kernel:
        for search in searches(name, STRICT_WORLDS, STRATEGIES):
            explorer = Explorer(replace(search, weak=False), kernel)
            for seed in range(2):
                assert explorer.run(seed).reports == [], f"{search}, seed {seed}"


def test_the_kernel_itself_passes():
    with watched_kernel(None) as kernel:
        for seed, search in enumerate(searches(None, WORLDS, STRATEGIES)):
            assert Explorer(search, kernel).run(seed).reports == [], f"{search}, seed {seed}"
