"""What a call on a GPU puts on which stream, what it waits for, and how it ends badly; on a stand-in."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from cases import assert_equals_oracle, assert_same_bits, random_routing, random_tokens, record_words, tiny_config
from interpreted_gpu import InterpretedCuda, LoggedGpu, make_layer
from pretended_gpus import ImagesHeap

from flashmoe_numba import FlashMoE
from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.kernel import control as s
from flashmoe_numba.kernel.state import Problem
from reference import Hosts, Weights

CONFIG = tiny_config(num_ranks=2, num_experts=2, num_topk=1, num_tokens=4)
COPIES = ["copy_in"] * 2 * CONFIG.num_ranks  # choices and weights of each rank


@pytest.fixture
def layer():
    with make_layer(CONFIG, Weights.random(CONFIG), num_processors=1) as layer:
        yield layer


def routing_and_tokens():
    counts = [CONFIG.num_tokens] * CONFIG.num_ranks
    idx, weights = random_routing(CONFIG, counts, 1)
    return random_tokens(CONFIG), dict(topk_idx=idx, topk_weights=weights)


def fail(layer, culprit=1):
    """What the kernel leaves where a rank gave up, as the copy behind the launch finds it."""
    for rank in layer._ranks:
        rank.control[s.ABORT] = culprit + 1
    control = layer._ranks[culprit].control
    words = [*record_words("role", "flag"), s.RECORD]
    for word, value in zip(words, (s.SUBSCRIBER, s.GATE_FLAG, s.COMPLETE), strict=True):
        control[word] = value


def on_gpu(layer, x):
    return [layer._backend.gpu.to_device(part) for part in x]


def on_host(y):
    return [part.get() for part in y]


def verbs(gpu):
    names = [verb for verb, _ in gpu.log]
    gpu.log.clear()
    return names


# order


def test_a_call_waits_for_the_last_one_before_it_writes_what_that_one_reads(layer):
    x, routing = routing_and_tokens()
    gpu = layer._backend.gpu
    layer(x, **routing)
    end = ["copy_rows", "launch", "copy_out", "record"]
    assert verbs(gpu) == [*COPIES, *end]
    layer(x, **routing)
    assert verbs(gpu) == ["wait_for", *COPIES, *end]
    layer(x)
    assert verbs(gpu) == ["wait_for", *end]


def test_everything_of_a_call_is_on_the_callers_stream(layer):
    x, routing = routing_and_tokens()
    gpu = layer._backend.gpu
    layer(x)
    for _ in range(2):
        gpu.caller = gpu.cupy.cuda.Stream(non_blocking=True)
        gpu.log.clear()
        layer(x, **routing)
        assert {stream for _, stream in gpu.log} == {gpu.caller.ptr}


def test_a_call_waits_for_nothing(layer, monkeypatch):
    x, routing = routing_and_tokens()
    x, queues, waits = on_gpu(layer, x), layer._backend.gpu.cupy.queues, []
    for verb in ("wait_for_device", "wait_for_stream"):
        monkeypatch.setattr(queues, verb, lambda *_: waits.append(1))
    for _ in range(3):
        layer(x, **routing)
    assert waits == []
    layer.synchronize()
    assert waits


def test_a_call_hands_over_one_record_per_rank(layer):
    gpu, copied = layer._backend.gpu, []
    gpu.copy_rows = lambda target, rows, skip, stream: copied.append((rows.copy(), target.size))
    gpu.launch = lambda *arguments: None
    layer(random_tokens(CONFIG))
    [(rows, table_words)] = copied
    assert len(rows) == CONFIG.num_ranks and rows.size == table_words
    word = Problem._fields.index("rank_idx")
    assert rows[:, word].tolist() == list(range(CONFIG.num_ranks)), "a word is the rank"


# page-locked memory


def test_what_copies_read_lives_until_their_call_is_done(layer):
    """Held while the event behind them is not done, and let go at the first call after that."""
    x, routing = routing_and_tokens()
    backend, events = layer._backend, []

    def record(stream):
        events.append(SimpleNamespace(done=False, capture=None))
        return events[-1]

    backend.gpu.record = record
    for _ in range(3):
        layer(x, **routing)
    per_call = len(COPIES) + 1
    assert [len(staged) for _, staged in backend._under_way] == [per_call] * 3
    events[0].done = events[1].done = True
    layer(x)
    assert [(event, len(staged)) for event, staged in backend._under_way] == [(events[2], per_call), (events[3], 1)]


# CUDA graphs


def test_a_captured_call_asks_and_waits_for_nothing_and_keeps_what_it_copies(layer):
    """The stand-in refuses to ask and to wait while it captures, as a GPU does."""
    x, routing = routing_and_tokens()
    gpu, expected = layer._backend.gpu, layer(x, **routing)
    gpu.log.clear()
    with gpu.captured() as graph:
        y = layer(on_gpu(layer, x), **routing)
    assert verbs(gpu) == [*COPIES, "copy_rows", "launch", "copy_out"]
    assert len(layer._backend._captured) == len(COPIES) + 1 + 2 * CONFIG.num_ranks, "tokens and results, too"
    graph[0].launch(gpu.caller)
    assert_same_bits(on_host(y), expected)
    assert_same_bits(layer(x, **routing), expected)


def test_the_first_call_can_be_captured(layer):
    x = random_tokens(CONFIG)
    gpu = layer._backend.gpu
    with gpu.captured() as graph:
        y = layer(on_gpu(layer, x))
    graph[0].launch(gpu.caller)
    assert_equals_oracle(on_host(y), x, Weights.random(CONFIG), CONFIG, layer.routing)


@pytest.mark.parametrize("captured", [False, True])
def test_a_call_that_was_given_up_is_told_by_the_next_eager_one(captured):
    with make_layer(CONFIG, Weights.random(CONFIG), num_processors=1) as layer:
        gpu, x = layer._backend.gpu, random_tokens(CONFIG)
        layer(x)
        original, gpu.launch = gpu.launch, lambda *arguments: fail(layer)
        if captured:
            with gpu.captured() as graph:
                layer(on_gpu(layer, x))  # nobody may look into a graph
            graph[0].launch(gpu.caller)
        else:  # the stand-in is done when it returns, so this call knows
            with pytest.raises(FlashMoEError, match="rank 0 stopped: rank 1, block 0"):
                layer(x)
        gpu.launch = original
        with pytest.raises(FlashMoEError, match="rank 1, block 0"):
            layer(x)


def test_an_error_that_is_known_late_is_told_by_no_captured_call():
    """As on a real GPU, which copies the abort word back when it is done."""
    with make_layer(CONFIG, Weights.random(CONFIG), num_processors=1) as layer:
        gpu, x, late = layer._backend.gpu, random_tokens(CONFIG), []
        launch, copy_out = gpu.launch, gpu.copy_out
        gpu.launch = lambda *arguments: fail(layer)
        gpu.copy_out = lambda *arguments: late.append(arguments)
        layer(x)
        gpu.launch = launch
        copy_out(*late[0])
        with gpu.captured():
            layer(on_gpu(layer, x))
        with pytest.raises(FlashMoEError, match="rank 1, block 0"):
            layer(x)


# ends


def stop_words(layer):
    return [int(rank.control.get()[s.ABORT]) for rank in layer._ranks]


def test_leaving_tells_all_ranks_who_left(layer):
    layer(random_tokens(CONFIG))
    rank = layer._ranks[1]
    layer._backend.leave(*rank.leaving(1))
    assert stop_words(layer) == [2, 2]
    with pytest.raises(FlashMoEError, match="rank 1 left in epoch 1 because of an error of its own"):
        layer.synchronize()


def test_leaving_says_why(layer):
    layer(random_tokens(CONFIG))
    layer._backend.leave(*layer._ranks[1].leaving(1), s.CLOSED_BY_THREAD)
    with pytest.raises(FlashMoEError, match=r"rank 1 left in epoch 1 because close\(\) was called in another thread"):
        layer.synchronize()


@pytest.mark.parametrize(("before", "after"), [([1, 1], [1, 1]), ([1, 0], [1, 1]), ([0, 1], [2, 1]), ([0, 0], [2, 2])])
def test_leaving_overwrites_no_stop(layer, before, after):
    """The first word is rank 0's, which decides whom all name; rank 1 leaves, and does nothing if it was stopped."""
    layer(random_tokens(CONFIG))
    for rank, word in zip(layer._ranks, before, strict=True):
        rank.control[s.ABORT] = word
    layer._backend.leave(*layer._ranks[1].leaving(1))
    assert stop_words(layer) == (before if before[1] else after)
    assert (layer._ranks[1].control.get()[s.RECORD] == s.COMPLETE) == (before[1] == 0)
    layer._life.closed = "tested"


class Recorder:
    """In place of NVSHMEM: what was put by whom to whom, and what the source held then."""

    def __init__(self, gpu):
        self.gpu, self.puts = gpu, []

    def put_signal(self, target, source, num_bytes, flag, word, rank_idx):
        self.puts.append((target, flag, word, rank_idx, self.gpu.read_now(source, num_bytes // 8)))


def test_leaving_puts_the_reason_to_other_hosts_with_the_stop():
    config = replace(CONFIG, num_ranks=4, num_experts=4)
    backend = InterpretedCuda(config, LoggedGpu(config, 0, "nvshmem"), heap="nvshmem")
    heap = ImagesHeap(4, Hosts((0, 1, 0, 1)))
    with FlashMoE.from_parts(config, Weights.random(config), heap, backend, num_processors=1) as layer:
        backend._nvshmem = recorder = Recorder(backend.gpu)
        rank = layer._ranks[3]
        backend.leave(*rank.leaving(1), s.CLOSED_BY_THREAD)
        assert stop_words(layer) == [0, 4, 0, 4], "those of other hosts are not within reach"
        for (target, flag, word, peer, control), expected in zip(recorder.puts, (0, 2), strict=True):
            own, control_at = backend.address(heap.segments[3]), rank.problem.control_at
            assert (peer, word, flag) == (expected, 4, own + control_at + 8 * s.ABORT)
            looked_at = backend.address(heap.segments_of(peer)[3]) - backend.address(heap.segments[peer])
            assert target == own + looked_at + control_at, "the image where the peer looks, by its place in a segment"
            assert s.record_fields(control).m == s.CLOSED_BY_THREAD and control[s.RECORD] == s.COMPLETE
        backend.leave(*rank.leaving(1))
        assert len(recorder.puts) == 2
        layer._life.closed = "tested"


def test_a_kernel_that_reaches_no_other_hosts_joins_no_network(layer):
    with pytest.raises(ValueError, match="heap must be 'nvshmem' in a CudaBackend of several hosts, got 'ipc'"):
        layer._backend.join_network(Recorder(layer._backend.gpu))


class Broken(RuntimeError):
    """As a GPU answers once a kernel of its context has failed: always, whatever it is asked."""


def broken(*_):
    raise Broken


def break_gpu(gpu):
    for verb in ("launch", "synchronize", "read_now", "write_word", "to_host", "record"):
        setattr(gpu, verb, broken)


def call_with_broken_gpu(layer):
    with layer:
        break_gpu(layer._backend.gpu)
        layer(random_tokens(CONFIG))


def test_the_error_of_a_broken_gpu_is_the_one_that_is_told():
    layer = make_layer(CONFIG, Weights.random(CONFIG), num_processors=1)
    with pytest.raises(Broken):
        call_with_broken_gpu(layer)
    with pytest.raises(FlashMoEError, match="its last call was interrupted by Broken"):
        layer(random_tokens(CONFIG))


def test_a_layer_closes_after_an_error_that_broke_the_gpu():
    layer = make_layer(CONFIG, Weights.random(CONFIG), num_processors=1)
    break_gpu(layer._backend.gpu)
    with pytest.raises(Broken):
        layer(random_tokens(CONFIG))
    layer.close()
    assert layer._parts.heap is None


class Stop(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


def test_ctrl_c_while_leaving_leaves_the_layer_closed():
    def interrupted(*_):
        raise Stop

    layer = make_layer(CONFIG, Weights.random(CONFIG), num_processors=1)
    break_gpu(layer._backend.gpu)
    layer._backend.leave = interrupted
    with pytest.raises(Stop):
        layer(random_tokens(CONFIG))
    with pytest.raises(FlashMoEError, match="its last call was interrupted by Broken"):
        layer(random_tokens(CONFIG))


def test_a_close_that_fails_tells_the_other_ranks():
    layer = make_layer(CONFIG, Weights.random(CONFIG), num_processors=1)
    layer(random_tokens(CONFIG))
    controls, heap, gpu = [rank.control for rank in layer._ranks], layer._parts.heap, layer._backend.gpu
    gpu.synchronize = broken
    with pytest.raises(Broken):
        layer.close()
    assert [int(control.get()[s.ABORT]) for control in controls] == [1, 1]
    assert heap.segments == []


def test_closing_tells_that_the_last_call_broke_the_gpu_and_closes():
    layer = make_layer(CONFIG, Weights.random(CONFIG), num_processors=1)
    layer(random_tokens(CONFIG))
    break_gpu(layer._backend.gpu)
    with pytest.raises(Broken):
        layer.close()
    assert layer._parts.heap is None
    layer.close()


def test_table_and_epochs_are_there_before_any_call(layer):
    backend = layer._backend
    assert [backend.epoch(position, 0) for position in range(CONFIG.num_ranks)] == [0, 0]
    layer(random_tokens(CONFIG))
    assert [stats.epoch for stats in layer.stats] == [1, 1]
    assert all(np.all(rank.left.get() == 0) for rank in layer._ranks)
