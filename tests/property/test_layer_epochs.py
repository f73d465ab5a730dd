"""Ranks that run ahead: each goes through its own calls without waiting for the others, as processes do.

A rank may be one epoch ahead of another. Then it overwrites signals of empty packets that the other has not looked at
yet, which the reader has to understand: a word of the next epoch says that the packet of this one was empty.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from cases import assert_same_bits, random_tokens, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import configs, token_counts

from flashmoe_numba import FlashMoE
from flashmoe_numba.backends.cpu import CpuBackend
from flashmoe_numba.device import fetch_add, ld_acquire, pause
from flashmoe_numba.device.compilation import interpreted
from flashmoe_numba.device.fibers import Scheduler
from reference import Weights

DEADLINE_NS = 30 * 10**9


@st.composite
def histories(draw, max_calls):
    """(config, weights, tokens of each call and rank): often few tokens, so that many packets are empty."""
    config = draw(configs(max_ranks=4, dtypes=("float32",)))
    counts = draw(st.lists(token_counts(config), min_size=2, max_size=max_calls))
    calls = [random_tokens(config, count, seed) for seed, count in enumerate(counts)]
    return config, Weights.random(config, bias=True), calls


def in_step(config, weights, calls, **settings):
    """The results when all ranks make each call together."""
    with FlashMoE(config, weights, **settings) as layer:
        return [layer(x) for x in calls]


def ahead_on_threads(config, weights, calls, num_processors, naps):
    """The same with a thread per rank, each making its calls; `naps` (rank, call) hold a rank back."""
    with FlashMoE(config, weights, num_processors=num_processors) as layer:

        def one_rank(rank):
            backend, results = CpuBackend(), []
            for epoch, x in enumerate(calls, start=1):
                if (rank.rank_idx, epoch) in naps:
                    time.sleep(0.005)
                y, record = rank.call(x[rank.rank_idx], None, epoch, DEADLINE_NS)
                backend.run_blocks(layer._backend.blocks(record), layer._life.leave)
                results.append(y)
            backend.close()
            return results

        with ThreadPoolExecutor(config.num_ranks) as pool:
            by_rank = list(pool.map(one_rank, layer._ranks))
        layer._life.raise_if_given_up()
        return [[results[call] for results in by_rank] for call in range(len(calls))]


def call_after_call(kernel, calls, arrivals, num_threads):
    """One lane of one block: all its calls, with a barrier of the rank's lanes between them."""
    for done, arguments in enumerate(calls, start=1):
        kernel(*arguments)
        fetch_add(arrivals, 0, 1)
        attempt = 0
        while ld_acquire(arrivals, 0) < done * num_threads:
            attempt = pause(attempt)


def ahead_on_fibers(config, weights, calls, num_processors, seed, lanes, preempt):
    kernel = interpreted("flashmoe_numba.kernel").persistent
    with FlashMoE(config, weights, backend="fibers", num_processors=num_processors) as layer:
        scheduler, results = Scheduler(seed, preempt), [[] for _ in calls]
        for rank in layer._ranks:
            by_block = [[] for _ in range(num_processors + 1)]
            for epoch, x in enumerate(calls, start=1):
                y, record = rank.call(x[rank.rank_idx], None, epoch, DEADLINE_NS)
                blocks = layer._backend.blocks(record)
                results[epoch - 1].append(y)
                for arguments, (_, _, block_arguments) in zip(by_block, blocks, strict=True):
                    arguments.append(block_arguments)
            arrivals, num_threads = np.zeros(1, np.int64), lanes * len(by_block)
            for (name, _, _), arguments in zip(blocks, by_block, strict=True):
                scheduler.add_block(name, call_after_call, (kernel, arguments, arrivals, num_threads), lanes)
        scheduler.run()
        layer._life.raise_if_given_up()
        return results


def assert_same_results(ahead, expected, config):
    for call, (got, wanted) in enumerate(zip(ahead, expected, strict=True), start=1):
        assert_same_bits(got, wanted, f"{config}, call {call} of {len(expected)}")


@given(
    histories(max_calls=6),
    st.integers(1, 2),
    st.integers(0, 2**32),
    st.integers(1, 2),
    st.sampled_from([0.05, 0.3, 0.9]),
)
def test_ranks_run_ahead_on_fibers(history, num_processors, seed, lanes, preempt):
    config, weights, calls = history
    expected = in_step(config, weights, calls, backend="fibers", num_processors=1)
    ahead = ahead_on_fibers(config, weights, calls, num_processors, seed, lanes, preempt)
    assert_same_results(ahead, expected, f"{config}, counts {[[len(part) for part in x] for x in calls]}")


@given(
    histories(max_calls=12), st.integers(1, 2), st.sets(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=4)
)
def test_ranks_run_ahead_on_threads(history, num_processors, naps):
    config, weights, calls = history
    expected = in_step(config, weights, calls)
    ahead = ahead_on_threads(config, weights, calls, num_processors, naps)
    assert_same_results(ahead, expected, f"{config}, counts {[[len(part) for part in x] for x in calls]}")


@pytest.mark.parametrize("backend", ["cpu", "fibers"])
def test_the_next_call_tells_before_an_empty_packet_is_seen(backend):
    """Rank 1 looks for the first time when rank 0, which it owes nothing, tells of 3 rows in the second epoch."""
    config = replace(tiny_config(), num_tokens=3)
    none = random_tokens(config, [0])[0]
    with FlashMoE(config, Weights.random(config), num_processors=1, backend=backend) as layer:
        rank, back = layer._ranks[1], layer._ranks[0].segments.result_flag
        from_0 = rank.segments.dispatch_flag.reshape(2, -1, 2)[0]
        from_0[:, 1], from_0[:, 0] = 1 << 32, [2 << 32 | 3, 2 << 32 | 0]
        for epoch, rows in ((1, 0), (2, 3)):
            _, record = rank.call(none, None, epoch, DEADLINE_NS)
            layer._backend.run([record], layer._life.leave)
            layer._life.raise_if_given_up()
            assert rank.stats(epoch, 0).rows_per_expert == (rows, 0), f"epoch {epoch}"
            assert back.any() == (epoch == 2), f"epoch {epoch}: results are sent for rows of epoch 2 only, {back}"
        first, *rest = back.reshape(config.num_experts, -1)[2].tolist()
        assert first == 2 << 32 | 3 and not any(rest), f"one tile of three rows: {back}"


few = settings(max_examples=max(3, settings().max_examples // 10))


@few
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_a_rank_without_tokens_goes_ahead_of_a_busy_one(seed, lanes):
    """Rank 0 has no tokens and gets none: all its packets are empty, and it is as far ahead as it can be."""
    config = tiny_config(num_topk=1, num_tokens=3)
    weights = Weights.random(config)
    weights.router[:2], weights.router[2:] = 0, 1
    calls = [[np.abs(part) for part in random_tokens(config, [0, 3], call)] for call in range(8)]
    expected = in_step(config, weights, calls, backend="fibers")
    ahead = ahead_on_fibers(config, weights, calls, 1, seed, lanes, 0.3)
    assert_same_results(ahead, expected, f"seed {seed}, lanes {lanes}")
