"""Layers on GPUs of several hosts, interpreted: their kernel's verbs of the network are a stand-in that copies.

It copies a piece at a time, and lets others run in between; a flag comes when all is there, control words now and then.
"""

import ctypes

import numpy as np
import pytest
from backward_cases import Call, assert_gradients_equal
from cases import assert_equals_oracle, assert_same_bits, random_routing, random_tokens, tiny_config
from interpreted_gpu import InterpretedCuda, LoggedGpu, make_layer
from pretended_gpus import ImagesHeap, PretendingBackend
from test_gpu_backward import on_gpu, on_host

from flashmoe_numba import FlashMoE
from flashmoe_numba.device import fibers, vocabulary
from flashmoe_numba.device.compilation import interpreted
from flashmoe_numba.device.fibers import memory_view
from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.heap.nvshmem import CONTROL_AT, CONTROL_SIZE, IMAGE_AT, OWN, SHOWN_AT, SHOWN_SIZE
from flashmoe_numba.kernel import control as s
from reference import Hosts, Weights

SEGMENTS = SHOWN_SIZE + 1
PIECE = 16  # bytes
WORD = np.dtype(np.int64)


class Network:
    """What the verbs mean, and how often each did something."""

    def __init__(self):
        self.puts = self.fences = self.signals = self.acquired = self.shown = 0

    def send_put(self, wire, put):
        if wire.dtype != np.uint64:
            return False
        there = int(wire[SEGMENTS + put.peer])
        if put.flag_at == wire[CONTROL_AT]:
            self._show(wire, put.peer, 0, wire[CONTROL_SIZE])
        self._copy(int(wire[OWN]) + put.source_at, there + put.target_at, put.num_bytes)
        self.puts += put.num_bytes > 0
        self.fences += put.flag_at < 0
        if put.flag_at >= 0:
            self.signals += 1
            vocabulary.st_release(memory_view(there + put.flag_at, 1, WORD), 0, put.word)
        return True

    def acquire_told(self, wire, words, i):
        self.acquired += wire.dtype == np.uint64
        return vocabulary.ld_acquire(words, i)

    def push_control(self, wire, remote, every_ns):
        if wire.dtype == np.uint64:
            self.shown += 1
            for peer in np.flatnonzero(remote):
                self._show(wire, peer, wire[SHOWN_AT], wire[SHOWN_SIZE])

    def _show(self, wire, peer, first, num_bytes):
        control, image = int(wire[OWN] + wire[CONTROL_AT]), int(wire[SEGMENTS + peer] + wire[IMAGE_AT])
        self._copy(control + int(first), image + int(first), int(num_bytes))

    def _copy(self, source, target, num_bytes):
        for at in range(0, num_bytes, PIECE):
            fibers.preempt()
            ctypes.memmove(int(target) + at, int(source) + at, min(PIECE, int(num_bytes) - at))


class Backend(PretendingBackend, InterpretedCuda):
    pass


@pytest.fixture
def network(monkeypatch):
    network, kernel = Network(), interpreted("flashmoe_numba.kernel")
    monkeypatch.setattr(kernel.wire, "send_put", network.send_put)
    monkeypatch.setattr(kernel.peers, "acquire_told", network.acquire_told)
    monkeypatch.setattr(kernel.peers, "push_control", network.push_control)
    return network


def make_apart(config, weights, hosts, seed=0, **how):
    heap, backend = (
        ImagesHeap(config.num_ranks, hosts),
        Backend(config, LoggedGpu(config, seed, "nvshmem"), heap="nvshmem"),
    )
    backend.heap = heap
    return FlashMoE.from_parts(config, weights, heap, backend, **how)


@pytest.mark.parametrize(
    ("of_rank", "dtype"), [((0, 1), "float32"), ((0, 0, 1, 1), "bfloat16"), ((0, 1, 0), "float16")]
)
def test_a_layer_has_the_bits_of_one_host(network, of_rank, dtype):
    num_ranks = len(of_rank)
    sizes = dict(num_ranks=num_ranks, num_experts=num_ranks, num_topk=2, num_tokens=5, hidden=6, ffn=5, capacity=3)
    config = tiny_config(**sizes, dtype=dtype)
    weights, rng = Weights.random(config, 1, bias=True), np.random.default_rng(num_ranks)
    one = make_layer(config, weights, num_processors=1)
    with one, make_apart(config, weights, Hosts(of_rank), 5, num_processors=1) as layer:
        for call in range(2):
            counts = rng.integers(0, config.num_tokens + 1, num_ranks)
            x, routing = random_tokens(config, counts, call), {}
            if call == 1:
                routing = dict(zip(("topk_idx", "topk_weights"), random_routing(config, counts, call), strict=True))
            y = layer(x, **routing)
            assert_equals_oracle(y, x, weights, config, layer.routing, external=bool(routing))
            assert_same_bits(y, one(x, **routing))
    assert network.puts > 0 and network.signals > network.puts, "empty packets are signals alone"
    assert network.acquired == network.signals
    assert network.fences == 0
    assert network.shown > 0


@pytest.mark.parametrize("save", ["rows+up", "nothing"])
def test_gradients_go_by_the_network_with_what_lies_beside_rows(network, save):
    config = tiny_config(num_ranks=3, num_experts=3, num_tokens=5, dtype="float64")
    weights, counts = Weights.random(config, 1, bias=True), [5, 0, 3]
    x, dy = random_tokens(config, counts, 1), random_tokens(config, counts, 2)
    with make_apart(config, weights, Hosts((0, 1, 0)), 3, num_processors=1, save=save) as layer:
        _, saved = layer.forward(on_gpu(layer, x))
        routing = layer.routing
        assert network.fences == 0
        found = layer.backward(saved, on_gpu(layer, dy))
        assert_gradients_equal(Call(dy, None, routing, on_host(found)), x, weights, config, {})
    assert network.fences > 0, "factors and their gradients are rows without a flag"


def test_a_rank_that_leaves_is_named_with_its_reason_by_those_of_other_hosts(network):
    """Its host puts the record and the abort word; here what that puts is done by the stand-in."""
    config = tiny_config(num_ranks=2, num_experts=2, num_topk=1, num_tokens=4)
    with make_apart(config, Weights.random(config), Hosts((0, 1)), num_processors=1) as layer:
        rank, backend = layer._ranks[1], layer._backend

        class Nvshmem:
            def put_signal(self, target, source, num_bytes, flag, word, peer):
                there = backend.address(backend.heap.segments[peer]) - backend.address(backend.heap.segments[1])
                ctypes.memmove(target + there, source, num_bytes)
                memory_view(flag + there, 1, WORD)[0] = word

        backend._nvshmem = Nvshmem()
        backend.leave(*rank.leaving(1), s.CLOSED_BY_THREAD)
        assert int(layer._ranks[0].control.get()[s.ABORT]) == 2
        image = backend.heap.segments_of(0)[1][rank.problem.control_at :].view(np.int64)
        assert s.record_in(image.get()).m == s.CLOSED_BY_THREAD
        with pytest.raises(
            FlashMoEError, match=r"rank 1 left in epoch 1 because close\(\) was called in another thread"
        ):
            layer.synchronize()
