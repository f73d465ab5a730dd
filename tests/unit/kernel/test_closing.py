"""How a layer ends: in order, in the middle of a call, by another thread, or while another rank goes on."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from cases import assert_same_bits, random_tokens, tiny_config

from flashmoe_numba import FlashMoE
from flashmoe_numba.backends import cpu
from flashmoe_numba.backends.host import FORWARD, Block
from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.heap.threads import ThreadHeap
from flashmoe_numba.kernel import control as s
from flashmoe_numba.kernel.signals import EPOCH_SHIFT
from flashmoe_numba.layer.life import Life
from reference import Weights

LONG_S = 20  # a deadline that no test waits for, unless the layer is wrong


class Together:
    """Segments that layers of one rank each share, and those that came to close."""

    def __init__(self, config):
        self.config, self.weights = config, Weights.random(config)
        self.segments, self.closing = [], set()

    def layers(self, **settings):
        """A layer for every rank, each as in a process of its own."""
        made = []
        for rank in range(self.config.num_ranks):
            heap, backend = OneRankHeap(self, rank), cpu.CpuBackend()
            made.append(FlashMoE.from_parts(self.config, self.weights, heap, backend, num_processors=1, **settings))
        return made


class OneRankHeap(ThreadHeap):
    all_here = False

    def __init__(self, together, rank):
        super().__init__(together.config.num_ranks)
        self._together, self.rank_indices = together, range(rank, rank + 1)

    def allocate(self, num_bytes, memory):
        if not self._together.segments:
            super().allocate(num_bytes, memory)
            self._together.segments = self.segments
        self.segments = self._together.segments

    def close(self, check):
        """Wait for all ranks, as under MPI."""
        if check is not None:
            self._together.closing.add(self.rank_indices[0])
            start = time.monotonic()
            while len(self._together.closing) < self.num_ranks:
                check()
                assert time.monotonic() < start + 2 * LONG_S, "not all ranks came to close"
                time.sleep(1e-3)
        super().close(check)


def outcomes(layers, bodies):
    """What each rank's body, given its layer, returns or raises; all at once, and the layer is closed after it."""

    def one(layer, body):
        try:
            with layer:
                return body(layer)
        except FlashMoEError as error:
            return error

    with ThreadPoolExecutor(len(layers)) as pool:
        return list(pool.map(one, layers, bodies))


def calls(number, x, rank):
    return lambda layer: [layer(x[rank]) for _ in range(number)]


@pytest.mark.parametrize("numbers", [[2, 1], [1, 2], [0, 1], [2, 1, 2], [3, 3, 2]])
def test_a_rank_that_closes_while_another_makes_one_more_call_is_named_at_once_by_all(numbers):
    config = tiny_config(num_ranks=len(numbers), num_experts=2 * len(numbers))
    x = random_tokens(config)
    layers = Together(config).layers(deadline_s=LONG_S)
    early = numbers.index(min(numbers))
    why = f"rank {early} closed its layer after {min(numbers)} calls, and another rank made one more"
    for rank, error in enumerate(outcomes(layers, [calls(n, x, rank) for rank, n in enumerate(numbers)])):
        assert isinstance(error, FlashMoEError), f"rank {rank}: {error}"
        assert str(error).startswith(why if rank == early else f"rank {rank} stopped: {why}"), f"rank {rank}: {error}"


def test_ranks_that_make_the_same_calls_close_in_order():
    config = tiny_config()
    x = random_tokens(config)
    with FlashMoE(config, Weights.random(config)) as layer:
        expected = layer(x)
    layers = Together(config).layers(deadline_s=LONG_S)
    for rank, results in enumerate(outcomes(layers, [calls(3, x, rank) for rank in range(2)])):
        for y in results:
            assert_same_bits(y, expected[rank])


def test_a_rank_that_waits_in_close_is_told_of_one_that_left():
    config = tiny_config()
    x = random_tokens(config)

    def leaves(layer):
        layer(x[1])
        raise FlashMoEError("of its own")

    layers = Together(config).layers(deadline_s=LONG_S)
    told, own = outcomes(layers, [calls(1, x, 0), leaves])
    assert str(told) == "rank 0 stopped: rank 1 left in epoch 1 because of an error of its own" and "of its" in str(own)


class Broken(Exception):
    pass


def test_a_call_that_raises_tells_all_ranks_also_without_a_with_block(monkeypatch):
    """Before the blocks run, or while they do."""

    def broken(*_, **__):
        raise Broken

    for place in ("run", "adopt"):
        config = tiny_config()
        layer, other = Together(config).layers(deadline_s=LONG_S)
        x = random_tokens(config)
        monkeypatch.setattr(layer._backend, place, broken)
        with pytest.raises(Broken):
            layer(x[0])
        assert other._ranks[0].control[s.ABORT] == 1
        with pytest.raises(
            FlashMoEError, match="rank 1 stopped: rank 0 left in epoch 1 because of an error of its own"
        ):
            other(x[1])


def test_a_close_in_another_thread_ends_the_call_and_says_so():
    config = tiny_config()
    x, begun = random_tokens(config), threading.Event()
    layer = FlashMoE(config, Weights.random(config), num_processors=1, deadline_s=LONG_S)
    layer(x)
    honest = layer._backend.run_blocks

    def without_rank_1(blocks, stop):  # the call would last for ever
        begun.set()
        honest(blocks[:2], stop)

    layer._backend.run_blocks = without_rank_1
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(layer, x)
        assert begun.wait(60)
        layer.close()
        with pytest.raises(FlashMoEError) as caught:
            call.result()
    assert str(caught.value) == "rank 0 left in epoch 2 because close() was called in another thread"
    with pytest.raises(FlashMoEError, match=r"this layer is closed: .*close\(\) was called in another thread"):
        layer(x)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_no_thread_outlives_a_call_that_fails(monkeypatch, failing):
    """One block fails when all have begun, the others go on until they are told to stop."""
    stopped, begun, ended = threading.Event(), threading.Barrier(3), []

    def block(number):
        begun.wait(60)
        if number == failing:
            raise Broken
        stopped.wait(60)
        ended.append(number)

    monkeypatch.setattr(cpu, "persistent", block)
    with contextlib.closing(cpu.CpuBackend()) as backend:
        with pytest.raises(Broken):
            backend.run_blocks([Block(f"block {number}", FORWARD, (number,)) for number in range(3)], stopped.set)
        assert sorted(ended) == sorted({0, 1, 2} - {failing}), "a block still runs"


def test_no_thread_outlives_a_layer_that_an_error_leaves():
    config = tiny_config()
    others = set(threading.enumerate())
    with contextlib.suppress(ZeroDivisionError), FlashMoE(config, Weights.random(config), num_processors=2) as layer:
        layer(random_tokens(config))
        assert set(threading.enumerate()) > others
        raise ZeroDivisionError
    assert set(threading.enumerate()) == others
    assert layer is not None, "and not because the layer itself is gone"


def test_calls_that_only_the_kernel_counted_are_no_calls_of_another_rank(monkeypatch):
    """As replays of a captured call are, which flags and blocks know of and hosts do not."""
    config, replays = tiny_config(), 2
    x = random_tokens(config)

    def replay(rank):
        def body(layer):
            layer(x[rank])
            layer._ranks[0].segments.dispatch_flag[:] += replays << EPOCH_SHIFT
            monkeypatch.setattr(layer._backend, "epoch", lambda position, counted: counted + replays)

        return body

    layers = Together(config).layers(deadline_s=LONG_S)
    assert outcomes(layers, [replay(rank) for rank in range(2)]) == [None, None]


@pytest.mark.parametrize(
    ("fails", "settings", "said"),
    [
        ("prepare", {}, "prepare"),
        ("", {"deadline_s": -1}, "deadline_s must be in"),
        ("", {"num_ranks": 3}, r"heap must have config.num_ranks=2 ranks, got 3"),
    ],
)
def test_a_layer_that_cannot_be_made_gives_back_what_it_was_given(monkeypatch, fails, settings, said):
    config, closed = tiny_config(), []
    backend, heap = cpu.CpuBackend(), ThreadHeap(settings.pop("num_ranks", config.num_ranks))

    def fail(*_):
        raise ValueError(fails)

    if fails:
        monkeypatch.setattr(backend, fails, fail)
    monkeypatch.setattr(backend, "close", lambda: closed.append(backend))
    monkeypatch.setattr(heap, "close", lambda check: closed.append(heap))
    with pytest.raises(ValueError, match=said):
        FlashMoE.from_parts(config, Weights.random(config), heap, backend, **settings)
    assert closed == [backend, heap]


def test_what_is_no_heap_or_backend_is_named():
    config = tiny_config()
    with pytest.raises(TypeError, match="heap must be an object with the methods of its protocol, got 'cpu'"):
        FlashMoE.from_parts(config, Weights.random(config), "cpu", cpu.CpuBackend())
    with pytest.raises(TypeError, match="backend must be an object with the methods of its protocol, got None"):
        FlashMoE.from_parts(config, Weights.random(config), ThreadHeap(config.num_ranks), None)


def test_a_backend_is_given_back_where_another_rank_could_not_make_its_own(monkeypatch):
    config, steps, closed = tiny_config(), [], []

    class Heap(OneRankHeap):
        def together(self, step):
            steps.append(step())
            if len(steps) == 2:
                raise RuntimeError("another rank could not start")

    monkeypatch.setattr(cpu.CpuBackend, "close", lambda self: closed.append(self))
    monkeypatch.setattr("flashmoe_numba.layer.layer.make_heap", lambda *_: Heap(Together(config), 0))
    with pytest.raises(RuntimeError, match="another rank"):
        FlashMoE(config, Weights.random(config))
    assert [type(backend) for backend in closed] == [cpu.CpuBackend]


def test_a_layer_refuses_the_call_that_flags_cannot_count():
    config = tiny_config(num_ranks=1)
    x = random_tokens(config)
    with FlashMoE(config, Weights.random(config), num_processors=1, backend="fibers") as layer:
        expected = layer(x)
        layer._life.epoch = 2**31 - 3
        for call in ("the last call but one", "the last call"):
            assert_same_bits(layer(x), expected, call)
        assert EPOCH_SHIFT == 32 and layer.stats[0].epoch == np.iinfo(np.int32).max
        for _ in range(2):
            with pytest.raises(FlashMoEError, match="at most 2147483647 calls"):
                layer(x)


@pytest.mark.timeout(30)  # else it would wait for itself
def test_close_inside_a_call_is_refused_and_ends_the_call(monkeypatch):
    """A signal handler runs in the thread that calls."""
    config = tiny_config(num_ranks=1)
    layer = FlashMoE(config, Weights.random(config), backend="fibers")
    monkeypatch.setattr(layer._backend, "run", lambda *_: layer.close())
    with pytest.raises(FlashMoEError, match=r"close\(\) was called inside a call of this layer"):
        layer(random_tokens(config, [3]))
    with pytest.raises(FlashMoEError, match="this layer is closed: its last call was interrupted by FlashMoEError"):
        layer(random_tokens(config, [3]))
    layer.close()


class Uncarried(ThreadHeap):
    """What a call sent to other hosts is not carried."""

    @contextlib.contextmanager
    def carrying(self, deadline_s):
        yield
        raise FlashMoEError("messages must be carried, and were not")


@pytest.mark.parametrize(("given_up", "said"), [(False, "must be carried, and were not"), (True, "rank 1 left in epo")])
def test_a_call_that_was_not_carried_closes_the_layer_and_tells_the_others(given_up, said, monkeypatch):
    """Unless it was given up: the record says who is to blame."""
    config = tiny_config()
    heap, backend = Uncarried(config.num_ranks), cpu.CpuBackend()
    layer = FlashMoE.from_parts(config, Weights.random(config), heap, backend, num_processors=1)
    controls, run = [rank.control for rank in layer._ranks], backend.run

    def run_and_leave(of_ranks, stop):
        run(of_ranks, stop)
        if given_up:
            backend.leave(*layer._ranks[1].leaving(1), s.FAILED)

    monkeypatch.setattr(backend, "run", run_and_leave)
    with pytest.raises(FlashMoEError, match=said):
        layer(random_tokens(config))
    assert layer.closed
    assert [int(control[s.ABORT]) for control in controls] == [1 + given_up] * config.num_ranks
    layer.close()


@pytest.mark.parametrize(("closed", "leaves"), [(None, 1), ("a call was given up", 0)])
def test_a_rank_that_was_told_to_stop_does_not_seem_to_be_the_first(closed, leaves):
    """Ranks of other hosts hear of whoever was, and not all at the same time."""
    left = []
    backend = SimpleNamespace(leave=lambda *arguments: left.append(arguments), close=lambda: None)
    heap = SimpleNamespace(close=lambda check: None)
    rank = SimpleNamespace(leaving=lambda epoch: (epoch, "segments"))
    life = Life(SimpleNamespace(heap=heap, backend=backend, ranks=[rank], drop=lambda: None))
    life.closed = closed
    life.end(orderly=False)
    assert len(left) == leaves and life.closed
