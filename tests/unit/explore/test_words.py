"""Litmus tests: what loads of atomic words may read when stores arrive late, and what they never read.

The outcomes are those of RC11 (explore/run/words.py), whose stores here all release: relaxed loads order nothing,
acquire loads order what comes after them.
"""

import pytest
from kernels import Bench

from flashmoe_numba.device import lane
from flashmoe_numba.device.fibers import Deadlock, RandomStrategy, current
from flashmoe_numba.explore.run.memory import NEVER
from flashmoe_numba.explore.run.watched import block_sync, cas, fetch_add, ld_acquire, ld_relaxed, pause, st_release
from flashmoe_numba.explore.run.words import MOST_LATE_POLLS

SEEDS = range(400)
X, Y, DONE = range(3)


def outcomes(program, blocks, weak=True, num_words=3, lanes=1):
    """What the loads of a run read together, in all runs: `program(block, words)` returns those of one fiber."""
    bench, found, read = Bench(lanes=lanes, blocks=blocks, words=num_words), set(), {}

    def kernel(block, words):
        read[block, lane()] = program(block, words) or ()

    for seed in SEEDS:
        bench.run(kernel, RandomStrategy(seed), late_seed=seed if weak else None)
        found.add(tuple(value for fiber in sorted(read) for value in read[fiber]))
    return found


def message_passing(load):
    def program(block, words):
        if block == 0:
            st_release(words, X, 1)
            st_release(words, Y, 1)
            return None
        return load(words, Y), load(words, X)

    return program


def test_a_relaxed_flag_brings_no_other_word():
    assert (1, 0) in outcomes(message_passing(ld_relaxed), 2)


def test_an_acquired_flag_brings_all_that_was_stored_before():
    assert outcomes(message_passing(ld_acquire), 2) == {(0, 0), (0, 1), (1, 1)}


def test_a_counted_flag_brings_all_that_was_stored_before():
    def program(block, words):
        if block == 0:
            st_release(words, X, 1)
            fetch_add(words, Y, 1)
            return None
        return fetch_add(words, Y, 0), ld_relaxed(words, X)

    assert outcomes(program, 2) == {(0, 0), (0, 1), (1, 1)}


def test_an_acquire_of_an_old_store_brings_no_newer_one():
    """The clock taken over is that of the store that was read."""

    def program(block, words):
        if block == 0:
            for i in (1, 2):
                st_release(words, X, i)
                st_release(words, Y, i)
            st_release(words, DONE, 1)
            return None
        while ld_relaxed(words, DONE) == 0:
            pause(0)
        return ld_acquire(words, Y), ld_relaxed(words, X)

    assert outcomes(program, 2) == {(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)}


def store_buffering(load):
    def program(block, words):
        st_release(words, block, 1)
        return (load(words, 1 - block),)

    return program


@pytest.mark.parametrize("load", [ld_relaxed, ld_acquire])
def test_two_that_store_then_look_may_miss_each_other(load):
    assert (0, 0) in outcomes(store_buffering(load), 2)


def test_two_that_count_then_look_may_not():
    def program(block, words):
        first = fetch_add(words, DONE, 1) == 0
        return first, fetch_add(words, DONE, 0)

    assert outcomes(program, 2) == {(True, 1, False, 2), (True, 2, False, 2), (False, 2, True, 1), (False, 2, True, 2)}


def independent_reads(block, words):
    """IRIW: two stores, two readers who look at them in different orders."""
    if block < 2:
        st_release(words, block, 1)
        return None
    first = block - 2
    return ld_acquire(words, first), ld_acquire(words, 1 - first)


def test_two_readers_may_disagree_about_the_order_of_two_stores():
    assert (1, 0, 1, 0) in outcomes(independent_reads, 4)


@pytest.mark.parametrize(
    ("program", "blocks", "weak_only"),
    [
        (message_passing(ld_relaxed), 2, (1, 0)),
        (store_buffering(ld_acquire), 2, (0, 0)),
        (independent_reads, 4, (1, 0, 1, 0)),
    ],
)
def test_sequentially_consistent_words_do_none_of_it(program, blocks, weak_only):
    found = outcomes(program, blocks, weak=False)
    assert weak_only not in found
    assert len(found) >= 3, f"{found}"


def test_no_reader_sees_a_word_go_backwards():
    def program(block, words):
        if block == 0:
            for value in range(1, 5):
                st_release(words, X, value)
            return None
        return [ld_relaxed(words, X) for _ in range(4)]

    found = outcomes(program, 2)
    assert all(list(read) == sorted(read) for read in found)
    assert len(found) > 20, "and otherwise it may see anything"


def test_what_an_acquire_brings_the_reads_of_is_not_older():
    """Coherence over two readers: block 1 has read X, and tells block 2."""

    def program(block, words):
        if block == 0:
            st_release(words, X, 1)
            return None
        if block == 1:
            read = ld_relaxed(words, X)
            st_release(words, Y, 1)
            return (read,)
        return ld_acquire(words, Y), ld_relaxed(words, X)

    found = outcomes(program, 3)
    assert (1, 0, 0) in found and (1, 1, 1) in found
    assert (1, 1, 0) not in found


def test_a_barrier_brings_what_the_other_lanes_have_stored_and_read():
    def program(block, words):
        if block == 0:
            if lane() == 0:
                st_release(words, X, 1)
            return None
        read = [ld_relaxed(words, X)] if lane() == 0 else []
        block_sync()
        return [*read, ld_relaxed(words, X)]

    assert outcomes(program, 2, lanes=2) == {(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 1, 1)}


def test_own_stores_are_never_late():
    def program(block, words):
        st_release(words, block, 1)
        return (ld_relaxed(words, block),)

    assert outcomes(program, 2) == {(1, 1)}


def test_counting_and_swapping_lose_nothing():
    def program(block, words):
        for _ in range(4):
            fetch_add(words, X, 1)
            while (value := fetch_add(words, Y, 0)) != cas(words, Y, value, value + 1):
                pass
        return None

    bench = Bench(blocks=3, words=2)
    for seed in range(100):
        bench.run(program, RandomStrategy(seed), late_seed=seed)
        assert bench.arrays[0].array.tolist() == [12, 12], f"seed {seed}"


def test_a_swap_that_failed_has_read_the_newest():
    def program(block, words):
        if block == 0:
            st_release(words, X, 1)
            return None
        return cas(words, X, 7, 8), ld_relaxed(words, X)

    assert outcomes(program, 2) == {(0, 0), (0, 1), (1, 1)}


def test_a_plain_store_begins_anew():
    def program(block, words):
        if block == 0:
            st_release(words, X, 1)
            st_release(words, X, 2)
            words[X] = 5
            st_release(words, Y, 1)
            return None
        return (ld_relaxed(words, X),) if ld_acquire(words, Y) else ()

    assert outcomes(program, 2) == {(), (5,)}


def test_the_bound_of_late_polls(monkeypatch):
    """However late loads are drawn to be, not more than MOST_LATE_POLLS pauses after the last store."""

    def program(block, words):
        if block == 0:
            st_release(words, X, 1)
        else:
            while ld_relaxed(words, X) != 1:
                pause(0)

    monkeypatch.setattr("flashmoe_numba.explore.run.words.LATE", 1.0)
    bench, late = Bench(blocks=2, words=1), set()
    for seed in range(100):
        bench.run(program, RandomStrategy(seed), late_seed=seed)
        verbs = [verb for _, verb, *_ in bench.history]
        late.add(len(verbs) - verbs.index("releases") - 2)
    assert max(late) == MOST_LATE_POLLS + 1, f"{late}"


def test_a_wait_for_ever_is_one_also_when_loads_are_late():
    def program(block, words):
        st_release(words, block, 1)
        while ld_relaxed(words, 1 - block) != 2:
            pause(0)

    bench = Bench(blocks=2, words=2)
    for seed in range(20):
        with pytest.raises(Deadlock):
            bench.run(program, RandomStrategy(seed), late_seed=seed)


def test_a_seed_replays_what_was_late():
    bench = Bench(blocks=4, words=2)

    def history(seed, late_seed):
        bench.run(independent_reads, RandomStrategy(seed), late_seed=late_seed)
        return bench.history

    first = [history(1, late_seed) for late_seed in range(20)]
    assert first == [history(1, late_seed) for late_seed in range(20)]
    assert len({str(each) for each in first}) > 1, "seeds should differ"


def test_a_store_arrives_in_time():
    """A load that may be late does not read what was overwritten more than so many switches ago."""
    bench, late = Bench(blocks=2, words=1), {}

    def kernel(block, words):
        for value in range(1, 100):
            if block == 0:
                st_release(words, X, value)
                continue
            read = ld_relaxed(words, X)
            overwritten = [message[-1] for message in words.word(X).messages[read + 1 :]]  # when
            if overwritten:
                late[within] = max(late[within], current().scheduler.switches - overwritten[0])

    for within in (NEVER, 3):
        bench.memory.arrives_within, late[within] = within, 0
        for seed in range(20):
            bench.run(kernel, RandomStrategy(seed), late_seed=seed)
    assert late[NEVER] > 3
    assert late[3] == 2, "what is as old as that has arrived"
