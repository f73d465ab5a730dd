"""A recorded schedule makes the same run again, and the default order is what it says."""

import pytest
from kernels import Bench

from flashmoe_numba.device import lane
from flashmoe_numba.explore.choose.schedules import Choice, Recorded, Scheduled
from flashmoe_numba.explore.choose.strategies import STRATEGIES, make_strategy
from flashmoe_numba.explore.run.watched import block_sync, fetch_add, ld_acquire, pause, st_release


def count_and_meet(block, words):
    """Every verb that a fiber may give way at."""
    for _ in range(4):
        fetch_add(words, block, 1)
        block_sync()
    if block == 0 and lane() == 0:
        st_release(words, 3, 1)
    attempt = 0
    while ld_acquire(words, 3) == 0:
        attempt = pause(attempt)


def history(bench, strategy):
    bench.run(count_and_meet, strategy)
    return bench.history


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_recorded_schedule_makes_the_same_run(name):
    bench = Bench(lanes=2, blocks=3, words=4)
    for seed in range(10):
        recorded = Recorded(make_strategy(name, seed, num_steps=60, depth=3))
        first = history(bench, recorded)
        again = Recorded(Scheduled(recorded.choices))
        assert history(bench, again) == first, f"seed {seed}"
        assert again.choices == recorded.choices


def names(bench, choices):
    """Who made the accesses, repetitions left out."""
    bench.run(lambda block, words: [fetch_add(words, block, 1) for _ in range(3)], Scheduled(choices))
    order = [name.removesuffix(" lane 0") for name, *_ in bench.history]
    return [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]


def test_the_default_order_has_no_choices():
    bench = Bench(blocks=3, words=4)
    recorded = Recorded(Scheduled())
    bench.run(count_and_meet, recorded)
    assert recorded.choices == []
    assert names(bench, []) == ["block 0", "block 1", "block 2"]


def test_a_choice_is_made_at_its_point():
    bench = Bench(blocks=3, words=4)
    assert names(bench, [Choice("", 0, "block 2")]) == ["block 2", "block 0", "block 1"]
    assert names(bench, [Choice("block 0", 2, "block 2")]) == ["block 0", "block 2", "block 0", "block 1"]
    assert names(bench, [Choice("block 0", 6, "block 2")]) == ["block 0", "block 2", "block 1"]  # when it has ended


def test_a_choice_that_cannot_be_made_is_left_out():
    bench = Bench(blocks=2, words=4)
    impossible = [Choice("block 0", 2, "block 7"), Choice("block 0", 99, "block 1"), Choice("block 0", 3, "block 0")]
    assert names(bench, impossible) == ["block 0", "block 1"]
    ended = [Choice("", 0, "block 1"), Choice("block 0", 2, "block 1")]
    assert names(bench, ended) == ["block 1", "block 0"]


def test_who_polls_in_vain_comes_last():
    def wait(block, words):
        attempt = 0
        while block < 2 and ld_acquire(words, 0) == 0:
            attempt = pause(attempt)
        if block == 2:
            ld_acquire(words, 1)
            ld_acquire(words, 1)
            st_release(words, 0, 1)

    bench = Bench(blocks=3, words=4)
    bench.run(wait, Scheduled([Choice("block 2", 1, "block 0")]))
    told = [(name.removesuffix(" lane 0"), verb) for name, verb, *_ in bench.history]
    assert told[:3] == [("block 0", "acquires"), ("block 1", "acquires"), ("block 2", "acquires")]
    assert told[3:6] == [("block 0", "acquires"), ("block 2", "acquires"), ("block 2", "releases")]  # not block 1
