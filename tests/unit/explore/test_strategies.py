"""Strategies: runs are replayed, PCT keeps its bound, and nobody starves."""

import itertools

import numpy as np
import pytest
from kernels import Bench

from flashmoe_numba.device import ld_acquire as plain_ld_acquire
from flashmoe_numba.device import pause as plain_pause
from flashmoe_numba.device import st_release as plain_st_release
from flashmoe_numba.device.fibers import Deadlock, RandomStrategy, Scheduler
from flashmoe_numba.explore.choose.strategies import STRATEGIES, PctStrategy, RoundRobinStrategy, make_strategy
from flashmoe_numba.explore.run.watched import fetch_add, ld_relaxed, pause, st_release

BUSY, LOOKS = 20, 20


def open_for_one_step(block, words):
    """The bug: block 1 looks often, and each time between two certain steps of block 0. It is of depth 2."""
    if block == 0:
        for _ in range(BUSY):
            fetch_add(words, 0, 1)
        st_release(words, 1, 1)
        st_release(words, 1, 0)
        for _ in range(BUSY):
            fetch_add(words, 0, 1)
    elif sum(ld_relaxed(words, 1) for _ in range(LOOKS)) == LOOKS:
        fetch_add(words, 2, 1)


def num_found(make, seeds):
    bench = Bench(words=3)
    found = 0
    for seed in seeds:
        bench.run(open_for_one_step, make(seed))
        found += int(bench.arrays[0].array[2])
    return found


def test_pct_finds_a_bug_of_depth_2_as_often_as_it_promises():
    num_steps, seeds = 2 * 2 * BUSY + 4 + LOOKS, range(1000)
    bound = 1 / (2 * num_steps)
    found = num_found(lambda seed: PctStrategy(seed, num_steps, depth=2), seeds)
    assert found / len(seeds) >= bound, f"{found} of {len(seeds)}, wanted {bound * len(seeds):.1f}"
    assert num_found(RandomStrategy, seeds) == 0, "the bug should be a rare one"
    assert num_found(lambda seed: PctStrategy(seed, num_steps, depth=1), seeds) == 0, "without change points"


def everybody_counts(block, words):
    for _ in range(10):
        fetch_add(words, block % 3, 1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_seed_replays_the_history(name):
    bench = Bench(blocks=3, words=3)

    def history(seed):
        bench.run(everybody_counts, make_strategy(name, seed, num_steps=60, depth=3))
        assert bench.arrays[0].array.tolist() == [10, 10, 10]
        return bench.history

    first = [history(seed) for seed in range(10)]
    assert first == [history(seed) for seed in range(10)]
    assert len({str(each) for each in first}) > 5, "seeds should differ"


def relay(index, words, num_turns):
    """Wait for one's turn, for ever polling in between."""
    for turn in range(num_turns):
        attempt = 0
        while plain_ld_acquire(words, 0) != 3 * turn + index:
            attempt = plain_pause(attempt)
        plain_st_release(words, 0, 3 * turn + index + 1)


@pytest.mark.parametrize("name", STRATEGIES)
def test_whoever_polls_starves_nobody(name):
    for seed in range(30):
        words = np.zeros(1, np.int64)
        scheduler = Scheduler(strategy=make_strategy(name, seed, num_steps=200, depth=4), max_switches=20_000)
        for index in range(3):
            scheduler.add_block(f"block {index}", relay, (index, words, 20))
        scheduler.run()
        assert words[0] == 60


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_deadlock_is_found_under_every_strategy(name):
    scheduler = Scheduler(strategy=make_strategy(name, 1, num_steps=20, depth=3), max_switches=20_000)
    for index in range(3):
        scheduler.add_block(f"block {index}", relay, (index, np.full(1, 7, np.int64), 20))
    with pytest.raises(Deadlock):
        scheduler.run()


def test_round_robin_gives_everybody_a_turn():
    bench = Bench(blocks=3, words=3)
    bench.run(everybody_counts, RoundRobinStrategy(0))
    names = [name for name, *_ in bench.history]
    assert all(len(set(names[i : i + 3])) == 3 for i in range(0, len(names), 3)), f"{names}"


def test_pct_runs_one_fiber_until_a_change_point():
    bench = Bench(blocks=3, words=3)
    for seed in range(20):
        bench.run(everybody_counts, PctStrategy(seed, num_steps=60, depth=2))
        names = [name for name, *_ in bench.history]
        changes = sum(a != b for a, b in itertools.pairwise(names))
        assert 2 <= changes <= 3, f"seed {seed}: {names}"


def test_pct_needs_no_more_change_points_than_steps():
    assert len(PctStrategy(0, num_steps=60, depth=10**12)._falls) <= 60


def test_a_strategy_that_there_is_not():
    with pytest.raises(ValueError, match="strategy must be one of random, pct, round-robin; got 'dfs'"):
        make_strategy("dfs", 0, num_steps=1, depth=1)


def test_pct_leaves_who_polls_in_vain_alone_until_a_store():
    """Others write other words all the time; what a wait looks at is stored to once."""

    def work_or_wait(block, words):
        if block == 0:
            for _ in range(BUSY):
                fetch_add(words, 0, 1)
            st_release(words, 1, 1)
            for _ in range(BUSY):
                fetch_add(words, 0, 1)
        else:
            while ld_relaxed(words, 1) == 0:
                pause(0)

    bench, most = Bench(blocks=3, words=2), 0
    for seed in range(50):
        bench.run(work_or_wait, PctStrategy(seed, num_steps=90))
        looks = [who for who, verb, *_ in bench.history if verb == "reads"]
        most = max(most, looks.count("block 1 lane 0"), looks.count("block 2 lane 0"))
    assert most == 2, "one look before the store, and one after"
