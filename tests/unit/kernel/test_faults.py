"""A wait that nobody ends gives up after its deadline, says what it waited for, and stops every rank."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, random_routing, random_tokens, record_words, tiny_config
from children import run_python

from flashmoe_numba import FlashMoE
from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.kernel import control as s
from flashmoe_numba.layer.failures import describe, explain
from reference import Routing, Weights

DEADLINE_S = 1.0


def call_without(layer, x, missing, routing=None):
    """One call in which the blocks of the rank `missing` do not run; returns the control words of all ranks."""
    layer._life.epoch += 1
    blocks = []
    for rank, part, given in zip(layer._ranks, x, routing or [None] * len(x), strict=True):
        _, record = rank.call(part, given, layer._life.epoch, int(DEADLINE_S * 1e9))
        if rank.rank_idx != missing:
            blocks += layer._backend.blocks(record)
    run_until_silence(layer, blocks, missing)
    return [rank.control for rank in layer._ranks]


def run_until_silence(layer, blocks, missing):
    """Run the blocks, and let rank `missing` seem at work until the other ranks have dispatched.

    So on a busy machine, too, nothing but what that rank owes is missing when the time for the deadline begins.
    """
    present = [rank for rank in range(layer.config.num_ranks) if rank != missing]
    odd, num_ranks = layer._life.epoch % 2, layer.config.num_ranks
    flags = [rank.segments.dispatch_flag[odd::2].reshape(num_ranks, -1) for rank in layer._ranks]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(layer._backend.run_blocks, blocks, layer._life.leave)
        dispatched = False
        while not dispatched:
            assert not running.done(), "given up although a rank was at work"
            dispatched = all((words[present] >> 32 == layer._life.epoch).all() for words in flags)
            layer._ranks[missing].control[s.PROGRESS] += 1  # also once after the last dispatch
            time.sleep(0.01)
        running.result()


@pytest.mark.parametrize("num_processors", [1, 3])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_rank_that_does_not_come_is_named_by_all_others(missing, num_processors):
    config = tiny_config(num_ranks=3, num_experts=6)
    x = random_tokens(config)
    with FlashMoE(config, Weights.random(config), num_processors=num_processors) as layer:
        layer(x)
        controls = call_without(layer, x, missing)
        others = [rank for rank in range(3) if rank != missing]
        culprits = {int(control[s.ABORT]) - 1 for control in controls}
        assert len(culprits) == 1 and culprits <= set(others), f"every rank stops, for one reason: {culprits}"
        (culprit,) = culprits
        first = explain(culprit, controls)
        parts = [
            f"rank {culprit}, block {num_processors} (OS block)",
            "epoch 2",
            f"the dispatch flag of rank {missing}",
        ]
        parts += [
            "it holds epoch 1",
            f"{DEADLINE_S:g} s",
            f"rank {missing} came as far as call 1, this one is at call 2",
        ]
        assert all(part in first for part in parts), f"{first!r} should have all of {parts}"
        for rank in range(3):
            message = explain(rank, controls)
            assert "epoch 2" in message and f"the dispatch flag of rank {missing}" in message, f"rank {rank}: {message}"
        with pytest.raises(FlashMoEError, match=rf"dispatch flag of rank {missing}"):
            layer._life.raise_if_given_up()
        with pytest.raises(FlashMoEError, match=r"this layer is closed: .*epoch 2"):
            layer(x)


@pytest.mark.parametrize(("silent", "named"), [(None, 0), (0, 1), (1, 0)])
def test_a_rank_that_waits_itself_is_not_the_one_to_name(silent, named):
    """Rank 2 is alone in epoch 2. One of the others says that it has long been waiting, in epoch 1."""
    config = tiny_config(num_ranks=3, num_experts=6)
    x = random_tokens(config)
    with FlashMoE(config, Weights.random(config), num_processors=1) as layer:
        layer(x)
        layer._life.epoch += 1
        _, record = layer._ranks[2].call(x[2], None, layer._life.epoch, int(DEADLINE_S * 1e9))
        if silent is not None:
            layer._ranks[silent].control[s.SILENT] = 1
        layer._backend.run([record], layer._life.leave)
        message = explain(2, [rank.control for rank in layer._ranks])
        assert f"waited for the dispatch flag of rank {named} for expert 0 here; it holds epoch 1" in message, message
        assert layer._ranks[2].control[s.SILENT] == 2, "rank 2 has been waiting itself"


def test_a_missing_result_is_named():
    """Rank 1 dispatches nothing wrong but its experts do no work: its processors are not there."""
    config = tiny_config()
    x, (topk_idx, topk_weights) = random_tokens(config, [4, 0]), random_routing(config, [4, 0])
    topk_idx[0][:] = [3, 2]  # all rows go to rank 1
    routing = [Routing(i.astype(np.int32), w.astype(np.float32)) for i, w in zip(topk_idx, topk_weights, strict=True)]
    with FlashMoE(config, Weights.random(config), num_processors=1) as layer:
        controls = call_without_results(layer, x, routing)
        record = controls[0]
        found = record[record_words("role", "flag", "peer", "expert", "m")].tolist()
        assert found == [s.SUBSCRIBER, s.RESULT_FLAG, 1, 0, 0], f"{record}"
        message = explain(0, controls)
        assert "the result flag of rank 1, its expert 0, row tile 0; it holds epoch 0; 2 flags missing" in message
        assert explain(1, controls) is not None


def call_without_results(layer, x, routing):
    """Rank 1 signals its empty packets by hand, and nothing else of it runs."""
    layer._life.epoch += 1
    (_, record), _ = (
        rank.call(part, given, layer._life.epoch, int(DEADLINE_S * 1e9))
        for rank, part, given in zip(layer._ranks, x, routing, strict=True)
    )
    layer._ranks[0].segments.dispatch_flag[2 * 2 :] = layer._life.epoch << 32
    run_until_silence(layer, layer._backend.blocks(record), missing=1)
    return [rank.control for rank in layer._ranks]


def test_without_its_processors_a_rank_waits_for_its_gate():
    config = tiny_config(num_ranks=1)
    x = random_tokens(config)
    with FlashMoE(config, Weights.random(config), num_processors=2) as layer:
        layer._life.epoch += 1
        _, record = layer._ranks[0].call(x[0], None, 1, int(DEADLINE_S * 1e9))
        layer._backend.run_blocks(layer._backend.blocks(record)[-1:], layer._life.leave)
        message = explain(0, [layer._ranks[0].control])
        assert "rank 0, block 2 (OS block) gave up in epoch 1" in message, message
        assert "waited for the gate of this rank; 1 flags missing" in message, message


def test_without_its_os_block_a_processor_speaks():
    config = tiny_config(num_ranks=1)
    x = random_tokens(config)
    with FlashMoE(config, Weights.random(config), num_processors=2) as layer:
        _, record = layer._ranks[0].call(x[0], None, 1, int(DEADLINE_S * 1e9))
        layer._backend.run_blocks(layer._backend.blocks(record)[:-1], layer._life.leave)
        message = explain(0, [layer._ranks[0].control])
        assert "(processor) gave up in epoch 1: waited for task" in message, message


def test_nothing_is_explained_without_a_fault():
    config = tiny_config()
    with FlashMoE(config, Weights.random(config)) as layer:
        layer(random_tokens(config))
        controls = [rank.control for rank in layer._ranks]
        assert [explain(rank, controls) for rank in range(2)] == [None, None]
        assert [describe(rank, control) for rank, control in enumerate(controls)] == [None, None]


@pytest.mark.parametrize("moment", range(3))
def test_a_host_that_looks_while_another_rank_gives_up_hears_the_whole_reason_or_nothing(moment):
    config = tiny_config()
    with FlashMoE(config, Weights.random(config)) as layer:
        layer(random_tokens(config))
        other, layer._parts.ranks = layer._ranks[0], layer._ranks[1:]  # as in the process of rank 1
        honest, copies = layer._backend.to_host, []

        def to_host(array):
            if len(copies) == moment:
                layer._backend.leave(*other.leaving(layer._life.epoch))
            copies.append(array)
            return honest(array)

        layer._backend.to_host = to_host
        said = []
        for _ in range(4):
            try:
                layer._life.raise_if_given_up()
            except FlashMoEError as error:
                said.append(str(error))
        assert set(said) == {"rank 1 stopped: rank 0 left in epoch 1 because of an error of its own"}, f"at {moment}"


def test_work_that_takes_longer_than_the_deadline_is_no_fault():
    """The deadline is for silence: it is not spent while any rank finishes tasks."""
    sizes = dict(num_tokens=2**15, hidden=2048, ffn=2048, num_experts=2, num_topk=1)
    config = tiny_config(**sizes, tile_m=32, tile_m_min=32, tile_n=64, token_block=64)
    with FlashMoE(config, Weights.random(config), num_processors=1, deadline_s=DEADLINE_S) as layer:
        num_tokens, took_s, y = 256, 0, None
        while took_s < 3 * DEADLINE_S:
            num_tokens *= 2
            assert num_tokens <= config.num_tokens, "this machine is too fast for the test: give it more work"
            x = random_tokens(config, [num_tokens, 0])
            idx = [np.ones((len(part), 1), np.int32) for part in x]  # rank 1 has all the work, and rank 0 waits for it
            factors = [part.astype(np.float32) for part in idx]
            began, smaller = time.monotonic(), y
            y, _ = layer(x, topk_idx=idx, topk_weights=factors)
            took_s = time.monotonic() - began
        assert_same_bits(y[: num_tokens // 2], smaller, "tokens that were also in a short call")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_closed_layer_stays_closed_after_a_fault(dtype):
    config = tiny_config(dtype=dtype)
    x = random_tokens(config)
    layer = FlashMoE(config, Weights.random(config), num_processors=1)
    call_without(layer, x, 1)
    for _ in range(2):
        with pytest.raises(FlashMoEError, match="rank 0, block 1"):
            layer(x) if layer._life.closed else layer._life.raise_if_given_up()
    layer.close()
    with pytest.raises(FlashMoEError, match="rank 0, block 1"):
        layer(x)


INTERRUPTED = """
import os, signal, threading
from cases import random_tokens, record_words, tiny_config
from flashmoe_numba import FlashMoE
from flashmoe_numba.errors import FlashMoEError
from reference import Weights

config = tiny_config()
x = random_tokens(config)
with FlashMoE(config, Weights.random(config), num_processors=2, deadline_s=600) as layer:
    layer(x)
    run = layer._backend.run_blocks
    layer._backend.run_blocks = lambda blocks, stop: run(blocks[:3], stop)  # without rank 1 it would last 600 s
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        layer(x)
    except KeyboardInterrupt:
        print("interrupted")
    try:
        layer(x)
    except FlashMoEError as error:
        print(error)
print("left")
"""


def run_script(script, timeout=100):
    """(exit status, stdout, stderr)"""
    done = run_python("-c", script, timeout=timeout)
    return done.returncode, done.stdout, done.stderr


def test_ctrl_c_in_a_call_ends_it_and_closes_the_layer():
    status, out, err = run_script(INTERRUPTED)
    assert status == 0, f"{out}\n{err}"
    lines = out.splitlines()
    assert lines[0] == "interrupted" and lines[-1] == "left", f"{out}\n{err}"
    assert "this layer is closed: its last call was interrupted by KeyboardInterrupt" in lines[1], out


def test_ctrl_c_that_nobody_catches_ends_the_process():
    script = INTERRUPTED.replace("except KeyboardInterrupt", "except ZeroDivisionError")
    status, out, err = run_script(script)
    assert status in (-signal.SIGINT, 130, 1), f"{status}\n{out}\n{err}"
    assert "KeyboardInterrupt" in err and "left" not in out, f"{out}\n{err}"


def test_two_threads_may_share_a_layer():
    """Their calls run one after the other."""
    config = tiny_config()
    weights, x = Weights.random(config), random_tokens(config)
    other = random_tokens(config, [3, 0], seed=9)
    with FlashMoE(config, weights) as layer, ThreadPoolExecutor(4) as pool:
        expected = layer(x), layer(other)
        results = list(pool.map(layer, [x, other] * 25))
        for turn, y in enumerate(results):
            assert_same_bits(y, expected[turn % 2], f"call {turn}")
