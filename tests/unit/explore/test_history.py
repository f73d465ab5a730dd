"""The history of small kernels, line by line, and what cells and words are called."""

import inspect
from dataclasses import replace

import pytest
from kernels import Bench

from flashmoe_numba.device.fibers import Deadlock
from flashmoe_numba.explore.choose.schedules import Choice, Scheduled
from flashmoe_numba.explore.run.cells import Cells, value_of, word
from flashmoe_numba.explore.run.reports import Report
from flashmoe_numba.explore.run.watched import fetch_add, ld_acquire, ld_relaxed, pause, st_release
from flashmoe_numba.explore.tell.history import Recorder
from flashmoe_numba.explore.tell.telling import Line, Teller, as_text
from flashmoe_numba.kernel.queue import COUNTER_STRIDE
from reference import MoEConfig

CONFIG = MoEConfig(
    num_ranks=2, num_tokens=4, hidden=5, ffn=3, num_experts=4, num_topk=2, gated=True, activation="silu",
    tile_m=4, tile_m_min=2, tile_n=4, token_block=2,
)  # fmt: skip
FLAG, DATA, COUNTERS = "rank 0 segments.dispatch_flag", "rank 0 segments.dispatch", "rank 1 queue.counters"


def wait_for(flag, i):
    attempt = 0
    while ld_acquire(flag, i) == 0:
        attempt = pause(attempt)


def signal(block, flag, data, counters):
    if block == 1:
        for column in range(5):
            data[column] = 7
        st_release(flag, 0, (1 << 32) | 2)
        fetch_add(counters, COUNTER_STRIDE, 3)
        return
    wait_for(flag, 0)
    data[0]


def signal_early(block, flag, data, counters):
    if block == 1:
        st_release(flag, 0, (1 << 32) | 2)
        data[3] = 7
        fetch_add(counters, 0, 1)
        return
    wait_for(flag, 0)
    data[3]


def wait_for_ever(block, flag, data, counters):
    wait_for(flag, block)


def at(function, text):
    """`function:line` of the line that ends with this text."""
    lines, first = inspect.getsourcelines(function)
    return f"{function.__name__}:{first + next(i for i, line in enumerate(lines) if line.rstrip().endswith(text))}"


def tell(kernel, choices=(), report=None):
    bench = Bench(blocks=2, **{FLAG: 4, DATA: 80, COUNTERS: 256})
    recorder = Recorder(Scheduled(choices), bench.memory, report)
    bench.run(kernel, recorder)
    return told(recorder, report), bench.memory.reports


def told(recorder, report=None):
    return Teller(CONFIG, report).tell([turn for turn in recorder.turns if turn.events])


def test_a_signal():
    zero, one = "block 0 lane 0", "block 1 lane 0"
    flag = "dispatch_flag(source 0, expert 0, flag 0)"
    assert tell(signal)[0] == [
        Line(
            one, 1, at(signal, "2)"),
            "writes rank 0's dispatch(source 0, expert 0, slot 0); "
            f"releases rank 0's {flag} = (call 1, 2 rows)", False,
        ),
        Line(one, 1, at(signal, "3)"), "adds to TAIL, now 3", False),
        Line(zero, 1, at(wait_for, "== 0:"), f"acquires {flag} = (call 1, 2 rows), polled 2 times", False),
        Line(zero, 1, at(signal, "data[0]"), "reads dispatch(source 0, expert 0, slot 0, column 0)", False),
    ]  # fmt: skip


def test_a_race_is_marked_and_the_history_ends_there():
    (report,) = tell(signal_early, [Choice("block 1", 1, "block 0")])[1]
    lines, _ = tell(signal_early, [Choice("block 1", 1, "block 0")], report)
    where, read = at(signal_early, "= 7"), at(signal_early, "data[3]")
    missing = f"no chain of releases and acquires leads from block 0 lane 0 at {read} to here"
    marked = [(line.who, line.where, line.what) for line in lines if line.marked]
    assert marked == [
        ("block 0 lane 0", read, "reads dispatch(source 0, expert 0, slot 0, column 3)"),
        ("block 1 lane 0", where, "writes rank 0's dispatch(source 0, expert 0, slot 0, column 3)"),
        ("block 1 lane 0", "", missing),
    ]
    assert [line.what for line in lines if not line.marked] == [
        "releases rank 0's dispatch_flag(source 0, expert 0, flag 0) = (call 1, 2 rows)",
        "acquires dispatch_flag(source 0, expert 0, flag 0) = (call 1, 2 rows), polled 2 times",
    ]


def test_an_atomic_access_may_be_the_last_one():
    def signal_plainly(block, flag, data, counters):
        if block == 0:
            flag[0] = 1 << 32
            return
        fetch_add(flag, 0, 1)
        fetch_add(flag, 0, 1)

    report = tell(signal_plainly)[1][0]
    lines, _ = tell(signal_plainly, report=report)
    assert [(line.who, line.what, line.marked) for line in lines[:-1]] == [
        ("block 0 lane 0", "writes dispatch_flag(source 0, expert 0, flag 0)", True),
        ("block 1 lane 0", "adds to rank 0's dispatch_flag(source 0, expert 0, flag 0), now (call 1, 1 rows)", True),
    ]


def test_a_deadlock_ends_with_what_all_wait_for():
    bench = Bench(blocks=2, **{FLAG: 4, DATA: 80, COUNTERS: 256})
    recorder = Recorder(Scheduled(), bench.memory)
    with pytest.raises(Deadlock):
        bench.run(wait_for_ever, recorder)
    assert [line.what for line in told(recorder, Report("deadlock", ""))] == [
        "still polls dispatch_flag(source 0, expert 0, flag 0) = (call 0, 0 rows)",
        "still polls rank 0's dispatch_flag(source 0, expert 0, flag 1) = (call 0, 0 rows)",
    ]


def test_a_late_load_says_what_it_missed():
    def look(block, flag, data, counters):
        if block == 0:
            st_release(flag, 0, (1 << 32) | 2)
        else:
            ld_relaxed(flag, 0)

    bench = Bench(blocks=2, **{FLAG: 4, DATA: 80, COUNTERS: 256})
    late = (
        "loads rank 0's dispatch_flag(source 0, expert 0, flag 0) = (call 0, 0 rows), late: (call 1, 2 rows) is there"
    )
    for seed in range(100):
        recorder = Recorder(Scheduled(), bench.memory)
        bench.run(look, recorder, late_seed=seed)
        if told(recorder)[-1].what == late:
            break
    assert (told(recorder)[-1].what, told(recorder)[-1].marked) == (late, False)
    assert told(recorder, Report("count", "of no access"))[-1].marked


def test_a_poll_that_was_interrupted_is_one_poll():
    def wait_for_either(block, flag, data, counters):
        if block == 1:
            fetch_add(counters, 0, 1)
            return
        ld_relaxed(flag, 0)
        ld_relaxed(flag, 1)
        pause(0)

    lines, _ = tell(wait_for_either, [Choice("block 0", 1, "block 1")])
    assert [line.who for line in lines] == ["block 1 lane 0"]


def test_only_the_last_round_before_a_pause_found_nothing():
    def look(block, flag, data, counters):
        for i in (0, 1, 0, 1):
            ld_relaxed(flag, i)
        pause(0)

    what = [f"loads dispatch_flag(source 0, expert 0, flag {i}) = (call 0, 0 rows)" for i in (0, 1)]
    assert [line.what for line in tell(look)[0] if line.who == "block 0 lane 0"] == what


@pytest.mark.parametrize(
    ("array", "cells", "wanted"),
    [
        ("rank 1 segments.dispatch", range(40, 50), "dispatch(source 1, expert 0, slots 0-1)"),
        ("rank 1 segments.result", [61, 62], "result(owner 1, expert 1, slot 0, columns 1-2)"),
        ("rank 0 segments.dispatch_flag", [3], "dispatch_flag(source 0, expert 1, flag 1)"),
        ("rank 0 segments.result_flag", [3], "result_flag(owner 1, expert 1, m 0)"),
        ("rank 0 received.hidden", range(3, 9), "hidden(rows 1-2)"),
        ("rank 0 tokens.x of call 2", [5], "x(token 1, column 0)"),
        ("rank 0 received.rows", [1, 3], "rows(sources 0-1, expert 1)"),
        ("rank 0 received.streams", [8, 12], "streams(expert 1, SEEN, WAITING)"),
        ("rank 0 received.tiles", [13], "tiles(source 1, expert 1, m 0, hidden)"),
        ("rank 0 received.places", [4, 5, 6], "places(row 1, ROW_IN, ROW_OUT, RANK)"),
        ("rank 0 received.arrived", [2], "arrived(expert 1, packet 0)"),
        ("rank 0 tokens.starts", [1, 2, 3, 7], "starts[1-3, 7]"),
        ("rank 0 queue.counters", [48], "GATE_OPEN"),
        ("data", [3], "data[3]"),
    ],
)
def test_cells_are_told_by_what_they_hold(array, cells, wanted):
    assert Cells(CONFIG).tell(array, dict.fromkeys(cells)) == wanted


def test_a_row_tile_has_an_index_of_its_own():
    tall = replace(CONFIG, num_tokens=9)  # three tiles a packet
    assert Cells(tall).tell("rank 0 segments.result_flag", {5: None}) == "result_flag(owner 0, expert 1, m 2)"


def test_a_task_is_told_where_all_its_fields_are_known():
    words = {17: 0x00000003_000001_02, 18: 0x00000004_00000001}  # of place 2: expert, peer, kind; n, m
    assert Cells(CONFIG).tell("rank 0 queue.tasks", words) == "place 2: GEMM0(source 1, expert 3, m 1, n 4)"
    assert Cells(CONFIG).tell("rank 0 queue.tasks", {17: 2}) == "place 2"


def test_words():
    assert word("rank 1 queue.tasks", 16) == "the stamp of place 2"
    assert word("rank 1 segments.control", 0) == "the abort word"
    assert word("rank 1 segments.dispatch_flag", 0) is None
    assert value_of("rank 1 segments.result_flag", (3 << 32) | 4) == "(call 3, 4 rows)"
    assert value_of("rank 1 queue.counters", 4) == "4"
    assert word("rank 1 queue.counters", 9 * 16 + 17) == "TAIL + 1"
    assert word("rank 1 queue.counters", 7 * 16) == "KEPT_ROWS"
    assert value_of("rank 1 segments.dispatch_flag", (3 << 32) | (2 << 24) | 4) == "(call 3, a backward, 4 rows)"


def test_the_last_lines_and_all_marked_ones_are_shown():
    lines = [Line("a" if i < 6 else "b", 1, f"f:{i}", f"does {i}", marked=i == 1) for i in range(8)]
    assert as_text(lines, 3) == [
        "  ... 1 lines",
        "> a  f:1  does 1",
        "  ... 3 lines",
        "  a  f:5  does 5",
        "  b  f:6  does 6",
        "     f:7  does 7",
    ]
    assert as_text(lines[6:], 40) == ["  b  f:6  does 6", "     f:7  does 7"]
