"""Each detector finds a small kernel with one mistake, whatever the interleaving, and passes the corrected one."""

import inspect
import re

import pytest
from kernels import Bench

from flashmoe_numba.device import lane, lanes
from flashmoe_numba.device.fibers import Deadlock, RandomStrategy
from flashmoe_numba.explore.run.watched import (
    array_at,
    block_sync,
    cas,
    fetch_add,
    ld_acquire,
    ld_relaxed,
    pause,
    st_release,
)

SEEDS = range(20)


def wait_for(words, i, value, load=ld_acquire):
    attempt = 0
    while load(words, i) != value:
        attempt = pause(attempt)


def kinds(kernel, lanes=1, blocks=2, seeds=SEEDS, **sizes):
    """Kinds of the reports of each seed."""
    bench = Bench(lanes, blocks, **sizes)
    return [bench.run(kernel, RandomStrategy(seed)) for seed in seeds], bench


def assert_found(kind, kernel, **how):
    """By every seed: no lucky interleaving is needed."""
    found, bench = kinds(kernel, **how)
    assert all(kind in each for each in found), f"{found}"
    return bench.memory.reports


def assert_clean(kernel, **how):
    found, bench = kinds(kernel, **how)
    assert found == [[]] * len(found), f"{bench.memory.reports}"


def signal(block, data, flag):
    if block == 0:
        data[3] = 7
        st_release(flag, 0, 1)
    else:
        wait_for(flag, 0, 1)
        assert data[3] == 7


def signal_by_a_plain_store(block, data, flag):
    if block == 0:
        data[3] = 7
        flag[0] = 1
    else:
        wait_for(flag, 0, 1)
        data[3]


def signal_before_the_data(block, data, flag):
    if block == 0:
        st_release(flag, 0, 1)
        data[3] = 7
    else:
        wait_for(flag, 0, 1)
        data[3]


def signal_read_relaxed(block, data, flag):
    if block == 0:
        data[3] = 7
        st_release(flag, 0, 1)
    else:
        wait_for(flag, 0, 1, ld_relaxed)
        data[3]


def signal_read_relaxed_then_acquired(block, data, flag):
    if block == 0:
        data[3] = 7
        st_release(flag, 0, 1)
    else:
        wait_for(flag, 0, 1, ld_relaxed)
        ld_acquire(flag, 0)
        assert data[3] == 7


def test_a_release_that_an_acquire_reads_orders():
    assert_clean(signal, data=4, flag=1)
    assert_clean(signal_read_relaxed_then_acquired, data=4, flag=1)


@pytest.mark.parametrize("kernel", [signal_by_a_plain_store, signal_before_the_data, signal_read_relaxed])
def test_without_release_or_acquire_it_is_a_race(kernel):
    reports = assert_found("race", kernel, data=4, flag=1)
    assert any(report.text.startswith(("data[3]:", "flag[0]:")) for report in reports)


@pytest.mark.parametrize("atomic", [ld_relaxed, ld_acquire, lambda words, i: fetch_add(words, i, 1)])
def test_a_plain_access_beside_an_atomic_one_is_a_race(atomic):
    def write(block, flag):
        if block == 0:
            atomic(flag, 0)
        else:
            flag[0] = 1

    reports = assert_found("race", write, flag=1)
    assert reports[0].text.startswith("flag[0]: ")


def test_a_race_names_both_places():
    (report,) = assert_found("race", signal_before_the_data, data=4, flag=1)
    lines, first = inspect.getsourcelines(signal_before_the_data)
    written = first + next(i for i, line in enumerate(lines) if "data[3] = 7" in line)
    read = first + next(i for i, line in enumerate(lines) if line.strip() == "data[3]")
    places = re.findall(r"(read|write) by (block \d) lane 0 in call 1 at signal_before_the_data:(\d+)", report.text)
    assert sorted(places) == [("read", "block 1", str(read)), ("write", "block 0", str(written))], f"{report}"


def test_a_released_word_passes_on_what_its_releaser_had_acquired():
    def chain(block, data, flag):
        if block == 0:
            data[0] = 7
            st_release(flag, 0, 1)
        elif block == 1:
            wait_for(flag, 0, 1)
            st_release(flag, 1, 1)
        else:
            wait_for(flag, 1, 1)
            assert data[0] == 7

    assert_clean(chain, blocks=3, data=1, flag=2)


def count_then_read(block, data, flag):
    data[block] = 7
    if fetch_add(flag, 0, 1) == 2:
        assert [data[b] for b in range(3)] == [7, 7, 7]


def read_one_early(block, data, flag):
    data[block] = 7
    if fetch_add(flag, 0, 1) == 1:
        [data[b] for b in range(3)]


def test_a_counter_orders_all_that_counted_before():
    assert_clean(count_then_read, blocks=3, data=3, flag=1)
    assert_found("race", read_one_early, blocks=3, data=3, flag=1)


def test_only_a_swap_that_succeeds_releases():
    def lock(block, data, flag):
        while cas(flag, 0, 0, 1) != 0:
            pause(0)
        data[0] += 1
        st_release(flag, 0, 0)

    def no_lock(block, data, flag):
        if block == 0:
            data[0] = 1
            cas(flag, 0, 5, 1)
        else:
            cas(flag, 0, 5, 1)
            data[0]

    assert_clean(lock, blocks=3, data=1, flag=1)
    assert_found("race", no_lock, data=1, flag=1)


def sum_of_lanes(block, data, flag):
    data[lane()] = 1
    block_sync()
    if lane() == 0:
        [data[i] for i in range(lanes())]
    block_sync()
    data[lane()] = 2


def sum_without_the_second_barrier(block, data, flag):
    data[lane()] = 1
    block_sync()
    if lane() == 0:
        [data[i] for i in range(lanes())]
    data[lane()] = 2


def test_a_barrier_orders_the_lanes_of_its_block_only():
    assert_clean(sum_of_lanes, lanes=3, blocks=1, data=3, flag=1)
    assert_found("race", sum_without_the_second_barrier, lanes=3, blocks=1, data=3, flag=1)
    assert_found("race", sum_of_lanes, lanes=3, blocks=2, data=3, flag=1)


def test_many_readers_are_all_remembered():
    def read_then_write(block, data, flag):
        if block < 3:
            data[0]
            st_release(flag, block, 1)
        else:
            for other in range(2):  # not for block 2
                wait_for(flag, other, 1)
            data[0] = 1

    reports = assert_found("race", read_then_write, blocks=4, data=1, flag=3)
    assert ["block 2" in report.text for report in reports] == [True]


def test_lanes_that_meet_in_different_places():
    def diverge(block, data):
        if lane() == 0:
            block_sync()
        else:
            block_sync()

    assert_found("barrier", diverge, lanes=2, blocks=1, data=1)


def test_a_cell_that_nobody_has_written():
    def copy(block, data):
        if lane() == 0:
            data[0] = 1
        block_sync()
        data[block]

    assert_clean(copy, lanes=2, blocks=1, data=2, empty=("data",))
    reports = assert_found("poison", copy, lanes=2, blocks=2, data=2, empty=("data",))
    assert reports[0].text.startswith("data[1]: read, but never written: block 1")


@pytest.mark.parametrize("i", [-1, 4])
def test_an_index_out_of_bounds(i):
    def read(block, data):
        data[i]

    def write(block, data):
        data[i] = 1

    def add(block, data):
        fetch_add(data, i, 1)

    for kernel in (read, write, add):
        (report,) = assert_found("out of bounds", kernel, data=4)
        assert report.text.startswith(f"data[{i}] of 4 elements, by block "), f"{report}"
        assert f"at {kernel.__name__}:" in report.text, f"{report}"


def test_an_address_where_no_array_begins():
    def view(offset, num_elements):
        return lambda block, data: array_at(data.array.ctypes.data + offset, num_elements, data)

    assert_clean(view(0, 4), data=4)
    assert_found("out of bounds", view(8, 1), data=4)
    assert_found("out of bounds", view(0, 5), data=4)


def test_a_part_that_another_rank_writes():
    def own_part(block, data):
        data[2 * block + 1] = 1

    def others_part(block, data):
        data[2 * (1 - block)] = 1

    def twice(block, data):
        data[2 * block] = 1
        data[2 * block] = 1

    assert_clean(own_part, data=4, writers=2)
    assert_found("conflict", others_part, data=4, writers=2)
    assert_found("conflict", twice, data=4, writers=2)
    _, bench = kinds(twice, seeds=[0], data=4, writers=2)
    who = r"block (\d) lane 0 in call 1 at twice:\d+"
    text = rf"data\[\d\]: written twice in call 1, before by {who}, now by {who}"
    assert all(re.fullmatch(text, report.text) for report in bench.memory.reports), f"{bench.memory.reports}"
    _, bench = kinds(others_part, seeds=[0], data=4, writers=2)
    text = r"data\[\d\]: written by rank \d, but it is rank \d's to write: block .*"
    assert all(re.fullmatch(text, report.text) for report in bench.memory.reports), f"{bench.memory.reports}"
    assert_clean(twice, data=4)


def test_a_wait_that_nobody_ends():
    with pytest.raises(Deadlock):
        kinds(lambda block, data: wait_for(data, 0, 1), data=1)


def test_no_report_is_said_twice_of_the_same_places():
    def race(block, data):
        for i in range(8):
            data[i] = block

    reports = assert_found("race", race, data=8)
    assert len(reports) == 1, f"{reports}"
