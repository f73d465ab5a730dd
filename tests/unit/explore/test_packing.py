"""Row tiles in the named worlds: of rows of several sources in most, and cut for every reason there is."""

from collections import Counter
from dataclasses import replace

import pytest
from cuts import FULL, IDLE, LAST, Cuts
from small_worlds import flashmoe, spec

from flashmoe_numba.explore.search import Explorer, Search, watched_kernel
from flashmoe_numba.explore.worlds import WORLDS
from reference.runs import packet_tile_height

MIXED = (
    "plain", "tall packets", "drops", "odd lanes", "every expert", "an expert a rank", "shared tiles", "three heights",
    "never comes", "lost on the way", "lost between two", "short of time", "grid",
)  # fmt: skip
SEVERAL = ("plain", "tall packets", "drops", "odd lanes", "every expert", "an expert a rank", "shared tiles")
BUSY = ("tall packets", "every expert")  # few interleavings have idle processors there
NUM_SEEDS = 16


def run_some(world, seeds=range(NUM_SEEDS), strategy="random"):
    """(row tiles of each expert in each call that ended, how often each reason to cut one came)."""
    tiles, reasons = [], Counter()
    with watched_kernel(None) as kernel:
        explorer = Explorer(Search(spec=world, strategy=strategy), kernel)
        cuts = explorer.world.memory.listener = Cuts(world.config)
        for seed in seeds:
            run = explorer.world.run(explorer.strategy(seed), explorer.late_seed(seed))
            assert explorer.checker.check(run) == [], f"seed {seed}"
            tiles += [of_expert for calls in run.calls for call in calls for of_expert in call.tiles]
        for (*_, why), count in cuts.cuts.items():
            reasons[why] += count
    return tiles, reasons


def is_mixed(tile):
    return len(tile.runs) > 1


@pytest.mark.parametrize("name", MIXED)
def test_row_tiles_hold_rows_of_several_sources(name):
    tiles, reasons = run_some(WORLDS[name])
    assert any(is_mixed(tile) for of_expert in tiles for tile in of_expert)
    assert set(reasons) >= ({LAST} if name in BUSY else {LAST, IDLE})
    if name in SEVERAL:
        assert any(len(of_expert) > 1 and any(map(is_mixed, of_expert)) for of_expert in tiles)


def test_tiles_are_full_and_of_all_heights():
    tiles, reasons = run_some(WORLDS["three heights"])
    assert set(reasons) == {FULL, LAST, IDLE}
    assert {tile.height for of_expert in tiles for tile in of_expert} == {2, 4, 8}
    assert {tile.height for of_expert in tiles for tile in of_expert if is_mixed(tile)} == {4, 8}


def test_a_packet_may_have_tiles_of_its_own():
    """None is mixed, and none waits for processors to be idle; the same packets are cut the same in every run."""
    tiles, reasons = run_some(WORLDS["own tiles"])
    assert not any(is_mixed(tile) for of_expert in tiles for tile in of_expert)
    assert reasons[IDLE] == 0 < reasons[FULL]
    per_run = len(tiles) // NUM_SEEDS
    assert tiles[:per_run] == tiles[per_run : 2 * per_run]
    config = WORLDS["own tiles"].config
    assert all(tile.height == packet_tile_height(tile.num_rows, config) for tiles in tiles for tile in tiles)


@pytest.mark.parametrize(("strategy", "name"), [("pct", "shared tiles"), ("round-robin", "plain")])
def test_other_strategies_come_to_mixed_tiles_and_both_rests(strategy, name):
    tiles, reasons = run_some(WORLDS[name], strategy=strategy)
    assert any(is_mixed(tile) for of_expert in tiles for tile in of_expert)
    assert set(reasons) == {FULL, LAST, IDLE}


def test_which_rows_share_a_tile_depends_on_the_seed_and_results_do_not():
    """The checker compares bits with those of the first seed."""
    tiles, _ = run_some(WORLDS["shared tiles"])
    per_run = len(tiles) // NUM_SEEDS
    runs = [tiles[i : i + per_run] for i in range(0, len(tiles), per_run)]
    assert len({repr(run) for run in runs}) > NUM_SEEDS // 2


def test_packing_is_a_flag(capsys):
    status, out, _ = flashmoe(capsys, "--world", "plain", "--packing", "none", "--seeds", "1")
    assert status == 0 and ", packing none; strategy random" in out
    planted = ["--plant", "packing-always", "--world", "plain", "--seeds", "3", "--history", "0"]
    status, out, _ = flashmoe(capsys, *planted, "--packing", "none")
    assert (status, "tiles: call 1, expert" in out) == (1, True)
    assert flashmoe(capsys, *planted, "--packing", "sources")[0] == 0, "it shows only where packets do not share"


def test_tiles_of_a_run_are_checked():
    """A checker that expects tiles of their own finds fault with shared ones."""
    world = spec(num_processors=1, epochs=1)
    with watched_kernel(None) as kernel:
        explorer = Explorer(Search(spec=world), kernel)
        run = explorer.world.run(explorer.strategy(0))
        explorer.world.spec = replace(world, packing="none")
        (report,) = explorer.checker.check(run)
    assert f"{report}".startswith("tiles: call 1, expert ")
    assert f"{report}".endswith("a packet must have tiles of its own, cut where its chunks are")
