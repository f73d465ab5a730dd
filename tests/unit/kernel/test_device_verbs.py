"""The verbs, compiled and interpreted, against NumPy and against their definition.

A test function is compiled from its Python source; on fibers the same source runs as it is.
"""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from numba import njit, types

from flashmoe_numba.device import (
    acquire_told,
    add_part,
    array_at,
    cas,
    copy_row,
    fetch_add,
    has_settled,
    lane,
    lanes,
    ld_acquire,
    ld_relaxed,
    load,
    now,
    part_columns,
    pause,
    push_control,
    scale_part,
    send_put,
    st_release,
    store,
    store_part,
    zero_sums,
)
from flashmoe_numba.device.cpu import JIT_OPTIONS, SETTLED_POLLS, SHORTEST_SLEEP_US, SPINS, YIELDS
from flashmoe_numba.device.fibers import Scheduler
from flashmoe_numba.kernel.wire import Put

compiled = njit(**JIT_OPTIONS)


def on_a_fiber(function, *arguments):
    scheduler = Scheduler()
    scheduler.add_block("test", function, arguments)
    scheduler.run()


def both(function):
    """[(name, callable)] of the compiled and the interpreted meaning of a function without a result."""
    return [("compiled", compiled(function)), ("interpreted", lambda *arguments: on_a_fiber(function, *arguments))]


def load_all(source, target):
    for i in range(source.size):
        target[i] = load(source, i)


def store_all(source, target):
    for i in range(source.size):
        store(target, i, source[i])


def use_network(wire, put, words, said):
    said[0] = send_put(wire, put)
    said[1] = acquire_told(wire, words, 1)
    push_control(wire, words, 7)


def test_on_a_host_somebody_must_carry_puts():
    """No verb of the network does anything there: the ring is the kernel's, and what is acquired a word of its own."""
    put = Put(1, 0, 8, 16, 24, 99)
    for name, function in both(use_network):
        wire, words, said = np.arange(32), np.array([5, 6]), np.full(2, -1)
        function(wire, put, words, said)
        assert said.tolist() == [False, 6], name
        assert wire.tolist() == list(range(32)), name
        assert words.tolist() == [5, 6], name


HALVES = {"float16": (np.uint16, np.float16), "bfloat16": (np.int16, ml_dtypes.bfloat16)}
ALL_PATTERNS = np.arange(65536, dtype=np.uint32).astype(np.uint16)


def assert_bits(got, expected, name, inputs):
    """Equal bit patterns; a NaN has to be a NaN."""
    word = {2: np.uint16, 4: np.uint32, 8: np.uint64}[got.dtype.itemsize]
    with np.errstate(invalid="ignore"):  # of signalling NaNs
        both_nan = np.isnan(got) & np.isnan(expected)
    differ = np.flatnonzero((got.view(word) != expected.view(word)) & ~both_nan)
    assert differ.size == 0, (
        f"{name}: {differ.size} differ, "
        f"first {inputs[differ[0]]!r} gives {got[differ[0]]!r}, not {expected[differ[0]]!r}"
    )


@pytest.mark.parametrize("dtype", HALVES)
def test_load_of_all_sixteen_bit_patterns(dtype):
    storage, element = HALVES[dtype]
    expected = ALL_PATTERNS.view(element).astype(np.float32)
    for name, function in both(load_all):
        got = np.full(65536, 7, np.float32)
        function(ALL_PATTERNS.view(storage), got)
        assert_bits(got, expected, name, ALL_PATTERNS)
        assert np.isnan(expected).sum() > 100


@pytest.mark.parametrize("dtype", HALVES)
def test_load_then_store_gives_every_pattern_back(dtype):
    storage, element = HALVES[dtype]
    floats = ALL_PATTERNS.view(element).astype(np.float32)
    for name, function in both(store_all):
        got = np.zeros(65536, storage)
        function(floats, got)
        assert_bits(got.view(element), ALL_PATTERNS.view(element), name, floats)


def rounding_inputs(element):
    """float32 numbers around every place where rounding to 16 bits is decided."""
    exact = ALL_PATTERNS.view(element).astype(np.float32)
    finite = np.sort(exact[np.isfinite(exact)])
    middles = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)  # ties: exact in float32
    top = np.float32(ml_dtypes.finfo(element).max)
    step = top - finite[finite < top].max()
    with np.errstate(over="ignore"):
        edge = np.array([top + step / 2, -top - step / 2, top + step, 3.4e38, -3.4e38], np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.17549435e-38], np.float32)
    nan_patterns = np.array([0x7F800001, 0x7F80FFFF, 0xFF800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    rng = np.random.default_rng(0)
    random = rng.integers(0, 2**32, 20_000, dtype=np.uint32).view(np.float32)
    around = [np.nextafter(values, np.float32(to)) for values in (middles, edge) for to in (-np.inf, np.inf)]
    return np.concatenate([middles, edge, *around, special, nan_patterns, random])


@pytest.mark.parametrize("dtype", HALVES)
def test_store_rounds_to_nearest_even(dtype):
    storage, element = HALVES[dtype]
    values = rounding_inputs(element)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.astype(element)
    for name, function in both(store_all):
        got = np.zeros(values.size, storage)
        function(values, got)
        assert_bits(got.view(element), expected, name, values)
        assert np.isinf(expected).sum() > 5


def test_a_tie_worked_out_by_hand():
    """Independent of ml_dtypes: 1 + 2^-8 is half way between two bfloat16, 1 + 2^-11 between two float16."""
    for storage, step in ((np.int16, 2.0**-7), (np.uint16, 2.0**-10)):
        values = np.array([1 + step / 2, 1 + 3 * step / 2, 1 + step / 2 + 2.0**-23, -1 - step / 2], np.float32)
        for name, function in both(store_all):
            got, back = np.zeros(4, storage), np.zeros(4, np.float32)
            function(values, got)
            dict(both(load_all))[name](got, back)
            assert back.tolist() == [1, 1 + 2 * step, 1 + step, -1], f"{name}, {storage}: {back.tolist()}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_load_and_store_of_accumulators_change_nothing(dtype):
    values = np.array([0.0, -0.0, 1 / 3, np.inf, 5e-324, 1e-45], dtype)
    for name, function in both(load_all) + both(store_all):
        got = np.full(values.size, 7, dtype)
        function(values, got)
        assert got.tobytes() == values.tobytes(), f"{name}: {got}"


def view_of(address, num_elements, like, target):
    view = array_at(address, num_elements, like)
    for i in range(view.size):
        target[i] = view[i]
    view[0] = view[1]


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float32, np.float64])
def test_array_at_sees_and_changes_the_memory_itself(dtype):
    for name, function in both(view_of):
        memory = np.arange(10, dtype=dtype)
        target = np.zeros(4, dtype)
        function(memory.ctypes.data + 3 * memory.itemsize, 4, memory, target)
        assert target.tolist() == [3, 4, 5, 6], name
        assert memory.tolist() == [0, 1, 2, 4, 4, 5, 6, 7, 8, 9], name


def copy_part(target, target_at, source, source_at, num_elements):
    copy_row(target, target_at, source, source_at, num_elements)


@pytest.mark.parametrize("dtype", [np.uint16, np.float64])
def test_copy_row_moves_bits(dtype):
    for num_elements in (0, 1, 7, 33):
        for name, function in both(copy_part):
            source = (
                np.random.default_rng(0).integers(0, 255, 50 * np.dtype(dtype).itemsize, dtype=np.uint8).view(dtype)
            )
            target = np.zeros(50, dtype)
            function(target, 5, source, 9, num_elements)
            expected = np.zeros(50, dtype)
            expected[5 : 5 + num_elements] = source[9 : 9 + num_elements]
            assert target.tobytes() == expected.tobytes(), f"{name}, {num_elements} elements"


def sum_two_rows(target, source, weights, scale, working):
    num_columns = source.size // 2
    width = part_columns(target, source, num_columns)
    for at in range(lane() * width, num_columns, lanes() * width):
        columns = min(width, num_columns - at)
        sums = zero_sums(working, columns)
        for row in range(2):
            add_part(sums, columns, source, row * num_columns + at, weights[row])
        scale_part(sums, columns, scale, at)
        store_part(target, at, sums, columns)


@pytest.mark.parametrize("num_lanes", [1, 3, 8])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_parts_of_rows_are_summed_once(dtype, num_lanes):
    """Rows of 7 in 3 lanes have a short last part, and some of 8 lanes have none."""
    storage, accumulator = (np.uint16, np.float32) if dtype == "float16" else (np.float64, np.float64)
    source = np.random.default_rng(0).integers(-9, 10, 14).astype(dtype)
    weights, working = np.array([0.5, -3], accumulator), np.full(7, np.nan, accumulator)
    target, scale = np.full(8, 7, dtype), np.array([1, -2, 0, 0.5, 4, 1, 3], accumulator)
    arguments = target.view(storage), source.view(storage), weights, scale, working
    if num_lanes == 1:
        compiled(sum_two_rows)(*arguments)
    else:
        scheduler = Scheduler()
        scheduler.add_block("test", sum_two_rows, arguments, num_lanes)
        scheduler.run()
    first, second = source.astype(np.float64).reshape(2, 7)
    assert target.tolist() == [*((first / 2 - 3 * second) * scale), 7]


def single_steps(words, got):
    got[0] = fetch_add(words, 1, 5)
    got[1] = cas(words, 2, 30, 99)
    got[2] = cas(words, 3, 30, 99)
    st_release(words, 4, -7)
    got[3] = ld_acquire(words, 4)
    got[4] = ld_relaxed(words, 0)
    got[5] = pause(41)
    got[6] = fetch_add(words, 0, -11)


def test_atomics_by_one_thread():
    for name, function in both(single_steps):
        words, got = np.arange(0, 60, 10), np.zeros(7, np.int64)
        function(words, got)
        assert got.tolist() == [10, 20, 30, -7, 0, 42, 0], name
        assert words.tolist() == [-11, 15, 20, 99, -7, 50], name


def wait_until_settled(got):
    attempt, start = 0, now()
    while not has_settled(attempt):
        attempt = pause(attempt)
    got[0] = now() - start


def test_a_wait_has_settled_only_after_it_slept():
    """A sleep takes no less than it should; it is what lets other ranks run that share the core."""
    function, got = compiled(wait_until_settled), np.zeros(1, np.int64)
    function(got)
    num_sleeps = SETTLED_POLLS - SPINS - YIELDS
    assert num_sleeps > 1
    sleeps = [SHORTEST_SLEEP_US * number for number in range(1, num_sleeps + 1)]
    assert got[0] >= 1000 * sum(sleeps)


def each_atomic(words, got):
    got[0] = ld_acquire(words, 3)
    got[1] = ld_relaxed(words, 4)
    st_release(words, 5, got[0])
    got[2] = fetch_add(words, 6, got[0])
    got[3] = cas(words, 7, got[0], got[1])


def test_atomics_have_their_order_and_width():
    """x86 orders almost everything by itself, so that only the intermediate code shows an order that is too weak."""
    function = compiled(each_atomic)
    function.compile((types.int64[::1], types.int64[::1]))
    (code,) = function.inspect_llvm().values()
    lines = re.findall(r"^.*\b(?:atomic|atomicrmw|cmpxchg)\b.*$", code, re.MULTILINE)
    patterns = [
        r"load atomic i64, .* acquire, align 8$",
        r"load atomic i64, .* monotonic, align 8$",
        r"store atomic i64 .* release, align 8$",
        r"atomicrmw add .*, i64 %\S+ acq_rel\b",
        r"cmpxchg .*, i64 %\S+, i64 %\S+ acq_rel acquire\b",
    ]
    assert len(lines) == len(patterns) and "syncscope" not in code, "\n".join(lines)
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.search(pattern, line.split(", !")[0]), f"{line} is not {pattern}"


def count_up(words, i, times, start):
    fetch_add(words, 0, 1)
    attempt = 0
    while ld_acquire(words, 0) < start:  # all begin together
        attempt = pause(attempt)
    for _ in range(times):
        fetch_add(words, i, 3)


def test_fetch_add_loses_nothing_between_threads():
    function, times, num_threads = compiled(count_up), 100_000, 4
    function.compile((types.int64[::1], types.int64, types.int64, types.int64))
    words = np.zeros(16, np.int64)
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda _: function(words, 8, times, num_threads), range(num_threads)))
    assert words[8] == 3 * times * num_threads


def claim(words, owners, me, num_places):
    won = 0
    for place in range(num_places):
        if cas(owners, place, 0, me) == 0:
            won += 1
    fetch_add(words, me, won)


def test_cas_has_one_winner_per_word():
    function, num_places = compiled(claim), 50_000
    words, owners = np.zeros(8, np.int64), np.zeros(num_places, np.int64)
    function.compile((types.int64[::1], types.int64[::1], types.int64, types.int64))
    threads = [threading.Thread(target=function, args=(words, owners, me, num_places)) for me in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert words.sum() == num_places and np.bincount(owners, minlength=4)[1:].tolist() == words[1:4].tolist()


def send(flags, data, mirror, num_messages):
    for message in range(1, num_messages + 1):
        for i in range(data.size):
            data[i] = message * 1000 + i
        st_release(flags, 0, message)
        attempt = 0
        while ld_acquire(flags, 8) < message:
            attempt = pause(attempt)


def receive(flags, data, mirror, num_messages):
    for message in range(1, num_messages + 1):
        attempt = 0
        while ld_acquire(flags, 0) < message:
            attempt = pause(attempt)
        for i in range(data.size):
            mirror[0] += data[i] != message * 1000 + i
        st_release(flags, 8, message)


@pytest.mark.parametrize("target", ["compiled", "interpreted"])
def test_a_release_brings_what_was_written_before(target):
    num_messages = 20_000 if target == "compiled" else 200
    flags, data, wrong = np.zeros(16, np.int64), np.zeros(33, np.int64), np.zeros(1, np.int64)
    arguments = (flags, data, wrong, num_messages)
    if target == "compiled":
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(compiled(function), *arguments) for function in (send, receive)]:
                future.result()
    else:
        scheduler = Scheduler(seed=1)
        for function in (send, receive):
            scheduler.add_block(function.__name__, function, arguments)
        scheduler.run()
    assert wrong[0] == 0 and flags[0] == flags[8] == num_messages


def clock(ticks):
    for i in range(ticks.size):
        ticks[i] = now()


def test_now_is_a_nanosecond_clock_that_never_goes_back():
    ticks = np.zeros(1000, np.int64)
    function = compiled(clock)
    function(ticks)
    before = time.monotonic_ns()
    function(ticks)
    after = time.monotonic_ns()
    assert (np.diff(ticks) >= 0).all() and before <= ticks[0] <= ticks[-1] <= after


def where(words):
    fetch_add(words, lane(), 1 + lanes())


def test_lanes():
    words = np.zeros(4, np.int64)
    compiled(where)(words)
    assert words.tolist() == [2, 0, 0, 0], "compiled for CPUs, a block has one lane"
    scheduler = Scheduler()
    words = np.zeros(4, np.int64)
    scheduler.add_block("test", where, (words,), lanes=3)
    scheduler.run()
    assert words.tolist() == [4, 4, 4, 0]
