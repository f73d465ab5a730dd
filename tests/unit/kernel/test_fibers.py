"""The deterministic scheduler: a seed replays a run, a barrier holds everybody, a stuck run is reported by place."""

import re

import numpy as np
import pytest
from cases import assert_same_bits, random_tokens, tiny_config

from flashmoe_numba import FlashMoE
from flashmoe_numba.device import block_sync, fetch_add, lane, lanes, ld_acquire, ld_relaxed, pause, st_release
from flashmoe_numba.device.compilation import interpreted
from flashmoe_numba.device.fibers import Deadlock, Scheduler
from reference import Weights


def run(kernel, *args, lanes=1, blocks=1, **settings):
    scheduler = Scheduler(**settings)
    for block in range(blocks):
        scheduler.add_block(f"block {block}", kernel, args, lanes)
    scheduler.run()
    return scheduler


def append_in_turns(log, words):
    for turn in range(20):
        fetch_add(words, 0, 1)
        log.append((lane(), turn))


def history(seed, preempt=0.3):
    log = []
    scheduler = run(append_in_turns, log, np.zeros(1, np.int64), lanes=4, seed=seed, preempt=preempt)
    return log, scheduler.switches


def test_a_seed_decides_the_interleaving():
    histories = [history(seed) for seed in range(20)]
    assert histories == [history(seed) for seed in range(20)]
    assert len({tuple(log) for log, _ in histories}) == 20, "different seeds should differ"
    for log, _ in histories:
        assert sorted(log) == sorted((lane, turn) for lane in range(4) for turn in range(20))


def test_preempt_is_the_probability_of_a_switch():
    alone, switches = history(5, preempt=0.0)
    assert switches == 4, "one switch per fiber"
    order = [lane for lane, _ in alone[::20]]
    assert alone == [(lane, turn) for lane in order for turn in range(20)]
    assert history(5, preempt=1.0)[1] == 4 + 2 * 4 * 20, "one before and one after each access"


def phases(log, num_phases, leavers):
    for phase in range(num_phases):
        log.append(phase)
        if lane() < leavers and phase == lane():
            return
        block_sync()


@pytest.mark.parametrize("num_lanes", [1, 2, 3, 5])
def test_nobody_passes_a_barrier_before_all_have_come(num_lanes):
    for seed in range(20):
        log = []
        run(phases, log, 4, 0, lanes=num_lanes, seed=seed)
        assert log == [phase for phase in range(4) for _ in range(num_lanes)], f"seed {seed}: {log}"


def test_a_barrier_does_not_wait_for_lanes_that_returned():
    for seed in range(20):
        log = []
        run(phases, log, 4, 2, lanes=4, seed=seed)
        # Lane 0 leaves in phase 0 and lane 1 in phase 1, each before the barrier.
        expected = [0] * 4 + [1] * 3 + [2] * 2 + [3] * 2
        assert log == expected, f"seed {seed}: {log}"


def test_barriers_of_different_blocks_are_independent():
    log = []
    run(phases, log, 3, 0, lanes=2, blocks=3, seed=1)
    assert sorted(log) == [phase for phase in range(3) for _ in range(6)]


def wait_for_a_signal(words):
    attempt = 0
    while ld_acquire(words, 0) != 1:  # the lost signal
        attempt = pause(attempt)


@pytest.mark.parametrize("preempt", [0.0, 0.3, 0.9])
def test_a_wait_that_nobody_ends_is_reported_with_its_place(preempt):
    with pytest.raises(Deadlock) as caught:
        run(wait_for_a_signal, np.zeros(1, np.int64), lanes=2, blocks=2, preempt=preempt, max_switches=100_000)
    lines = str(caught.value).split("\n")
    assert "every live thread polls and nobody writes" in lines[0]
    first = wait_for_a_signal.__code__.co_firstlineno
    places = {re.fullmatch(r"\s+(block \d) lane (\d) at wait_for_a_signal:(\d+)", line).groups() for line in lines[1:]}
    assert {(block, lane) for block, lane, _ in places} == {(f"block {b}", str(n)) for b in range(2) for n in range(2)}
    assert all(first < int(line) <= first + 3 for _, _, line in places), f"{lines}"


def write_for_ever(words):
    attempt = 0
    while True:
        fetch_add(words, 0, 1)
        attempt = pause(attempt)


def test_a_livelock_ends():
    with pytest.raises(RuntimeError, match=r"still running after 1001 switches[\s\S]*write_for_ever"):
        run(write_for_ever, np.zeros(1, np.int64), lanes=2, max_switches=1000)


def barrier_of_one_half(words):
    if lane() == 0:
        block_sync()
    else:
        wait_for_a_signal(words)


def test_a_barrier_that_never_fills_is_a_deadlock():
    with pytest.raises(Deadlock):
        run(barrier_of_one_half, np.zeros(1, np.int64), lanes=2, max_switches=100_000)


def late_signal(words):
    if lane() == 0:
        for _ in range(2000):
            ld_relaxed(words, 0)  # at work for a long time, giving way without polling
        st_release(words, 0, 1)
    else:
        wait_for_a_signal(words)


def test_a_signal_that_comes_in_time_is_no_deadlock():
    for lanes_ in (2, 8):
        words = np.zeros(1, np.int64)
        run(late_signal, words, lanes=lanes_)
        assert words[0] == 1


def test_fibers_that_are_lost_never_run_again():
    """Neither those that are ready, nor those at a barrier, nor the one that runs."""
    scheduler, log, blocks = Scheduler(0), [], {}

    def body(name):
        if lane() == 0 and name == "lost":
            pause(0)
            scheduler.lose(blocks["lost"])
        if name == "lost" and lane() == 1:
            block_sync()
        for _ in range(20):
            pause(0)
        log.append((name, lane()))

    for name in ("lost", "others"):
        blocks[name] = scheduler.add_block(name, body, (name,), 3)
    scheduler.run()
    assert sorted(log) == [("others", 0), ("others", 1), ("others", 2)]
    assert scheduler.live == 0


def test_how_long_all_must_poll_to_wait_for_ever_can_be_said():
    def body(words):
        attempt = 0
        while ld_relaxed(words, 0) == 0 and attempt < 100:
            attempt = pause(attempt)

    run(body, np.zeros(1, np.int64), blocks=2, quiet_polls=100)
    with pytest.raises(Deadlock):
        run(body, np.zeros(1, np.int64), blocks=2)


def raise_in_one(words):
    if lane() == 1:
        raise ZeroDivisionError("planted")
    wait_for_a_signal(words)


def test_an_exception_in_a_fiber_reaches_the_caller():
    with pytest.raises(ZeroDivisionError, match="planted"):
        run(raise_in_one, np.zeros(1, np.int64), lanes=3)


def test_the_layer_on_fibers_is_replayed_by_its_seed():
    config = tiny_config(num_ranks=2)
    weights, x = Weights.random(config), random_tokens(config)

    def traces(seed, lanes):
        with FlashMoE(config, weights, backend="fibers", seed=seed, lanes=lanes, trace=True, num_processors=2) as layer:
            y = layer(x)
            return y, {key: trace.tobytes() for key, trace in layer.traces.items()}

    first, again, other = traces(3, 2), traces(3, 2), traces(4, 2)
    assert first[1] == again[1], "the same seed gave another history (times are counted in switches)"
    assert first[1] != other[1], "another seed gave the same history"
    assert_same_bits(first[0], again[0])
    assert_same_bits(first[0], other[0])


def test_a_lost_signal_of_the_kernel_is_reported_with_its_place(monkeypatch):
    config = tiny_config()
    weights, x = Weights.random(config), random_tokens(config)
    kernel = interpreted("flashmoe_numba.kernel")
    tell = kernel.peers.tell_results

    def forgets_one(p, segments, source, e, m, slot, num_rows):
        if not (p.epoch == 2 and p.rank_idx == e == m == 0):
            tell(p, segments, source, e, m, slot, num_rows)

    with FlashMoE(config, weights, backend="fibers", lanes=2, num_processors=1) as layer:
        layer(x)
        monkeypatch.setattr(kernel.gemms, "tell_results", forgets_one)
        with pytest.raises(Deadlock, match=r"rank \d OS block lane \d at .*subscribe:\d+") as caught:
            layer(x)
        assert str(caught.value).count("wait_for_place:") == 2, f"{caught.value}"
        with pytest.raises(RuntimeError, match="closed: its last call was interrupted by Deadlock"):
            layer(x)


def test_the_interpreted_kernel_is_a_second_copy():
    twin = interpreted("flashmoe_numba.kernel")
    import flashmoe_numba.kernel as compiled

    assert twin is interpreted("flashmoe_numba.kernel") and twin is not compiled
    assert not hasattr(twin.persistent, "py_func") and hasattr(compiled.persistent, "py_func")
    assert lanes.__module__ == "flashmoe_numba.device.vocabulary"
