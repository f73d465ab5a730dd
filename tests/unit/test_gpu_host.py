"""The host's side of a GPU, on stand-ins: for CuPy with two devices, and for the driver."""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from stand_ins import ENTRY, make_stand_in

from flashmoe_numba.gpu import arrays, libcuda
from flashmoe_numba.gpu.gpu import OWN_BYTES, SIDE_WORDS, Gpu
from flashmoe_numba.ptx.stand_in import installed
from flashmoe_numba.ptx.stand_in.runtime import BUS_IDS
from reference import MoEConfig

RELAXED, GLOBAL = 2, 0
DEVICE = 1  # not the current one
CONFIG = MoEConfig(
    num_ranks=1, num_tokens=4, hidden=8, ffn=8, num_experts=2, num_topk=1, gated=False, activation="relu",
    dtype="float16", tile_m=4, tile_m_min=4, tile_n=8,
)  # fmt: skip


@pytest.fixture
def cupy():
    with installed(make_stand_in(capability=(9, 0))) as cupy:
        yield cupy


@pytest.fixture
def gpu(cupy):
    return Gpu(DEVICE)


# streams and memory


def test_a_device_says_what_it_is(gpu):
    assert (Gpu.count(), gpu.device, gpu.capability, gpu.multiprocessors) == (2, DEVICE, (9, 0), 2)
    assert gpu.shared_bytes == 227 << 10
    with pytest.raises(ValueError, match=r"device must be in \[0, 1\], the GPUs of this machine; got 2"):
        Gpu(2)


def seen_streams(cupy, monkeypatch):
    """(device, stream) of each stream that is asked for, in order."""
    queues, seen = cupy.queues, []
    queue = queues.queue
    monkeypatch.setattr(queues, "queue", lambda stream: seen.append((queues.device, stream)) or queue(stream))
    return seen


def test_everything_is_done_on_the_gpu_and_in_the_stream_that_were_named(gpu, cupy, monkeypatch):
    words, array = gpu.pinned(2, np.int64), gpu.zeros(2, np.int64)
    function = gpu.load("a.cubin", ENTRY, 0)
    with gpu.here:
        streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(7)]
    ask, record, wait, launch, put, rows, take = (stream.ptr for stream in streams)
    seen = seen_streams(cupy, monkeypatch)
    for verb, stream in (
        (lambda: gpu.is_capturing(ask), ask),
        (lambda: gpu.wait_for(gpu.record(record), wait), wait),
        (lambda: gpu.launch(function, 1, 128, (1, 2), 0, launch), launch),
        (lambda: gpu.copy_in(gpu.address(array), words, put), put),
        (lambda: gpu.copy_rows(array, words.reshape(1, 2), 0, rows), rows),
        (lambda: gpu.copy_out(words, gpu.address(array), take), take),
    ):
        seen.clear()
        verb()
        assert set(seen) == {(DEVICE, stream)} | ({(DEVICE, record)} if stream == wait else set())
    assert cupy.cuda.runtime.getDevice() == 0


def test_words_are_read_and_written_in_a_stream_of_their_own(gpu, cupy, monkeypatch):
    words = gpu.to_device(np.arange(4, dtype=np.int64))
    address, seen = gpu.address(words), seen_streams(cupy, monkeypatch)
    gpu.write_word(address + 8, -(2**40))
    first, second = gpu.read_now(address, 4), gpu.read_now(address + 16, 2)
    assert (first.tolist(), second.tolist()) == ([0, -(2**40), 2, 3], [2, 3])
    assert set(seen) == {(DEVICE, gpu._side.ptr)} and gpu._side_words.size == SIDE_WORDS


def test_rows_are_copied_but_for_their_first_words(gpu, cupy):
    target, rows = gpu.zeros(6, np.int64), gpu.pinned(6, np.int64)
    rows[:] = range(6)
    gpu.copy_rows(target, rows.reshape(2, 3), 1, 0)
    assert gpu.to_host(target).tolist() == [0, 1, 2, 0, 4, 5]


def test_the_shared_memory_of_a_kernel_that_layers_share_only_grows(gpu):
    for wanted, limit in ((100 << 10, 100 << 10), (60 << 10, 100 << 10), (200 << 10, 200 << 10)):
        assert gpu.load("a.cubin", ENTRY, wanted).max_dynamic_shared_size_bytes == limit


def test_memory_that_others_map_fills_whole_allocations(gpu, cupy):
    for num_bytes, whole in ((1, OWN_BYTES), (OWN_BYTES, OWN_BYTES), (OWN_BYTES + 1, 2 * OWN_BYTES)):
        segment = gpu.allocate_alone(num_bytes)
        assert (segment.size, segment.device.id) == (num_bytes, DEVICE)
        assert cupy.foreign == [(gpu.address(segment), whole)]
        gpu.free_alone(segment)
        assert cupy.foreign == []
    with pytest.raises(MemoryError, match=r"GPU 1 \(.*\) has 1.00 of 1.00 GiB free, and 2.00 GiB more are needed"):
        gpu.allocate_alone(2 << 30)


def test_a_gpu_reaches_itself_its_peers_and_nothing_that_it_does_not_see(gpu):
    own, other = BUS_IDS[DEVICE], BUS_IDS[0]
    assert gpu.bus_id() == own
    assert [gpu.can_access(bus_id) for bus_id in (own, other, "0000:0C:00.0")] == [True, True, False]
    with installed(make_stand_in(peers=False)):
        assert [Gpu(DEVICE).can_access(bus_id) for bus_id in (own, other)] == [True, False]


# the driver


ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p,
    *[ctypes.POINTER(ctypes.c_uint64)] * 2, *[ctypes.POINTER(ctypes.c_uint32)] * 2, *[ctypes.c_int] * 4,
)  # fmt: skip


def test_a_tensor_map_is_encoded_where_the_driver_writes_it():
    """Called by the C convention of cuTensorMapEncodeTiled; the numbers are those of cuda.h."""
    calls = []

    def encode(room, kind, rank, address, dims, strides, box, steps, *how):
        calls.append((kind, address, dims[:rank], strides[: rank - 1], box[:rank], steps[:rank], how, room % 64))
        ctypes.memmove(room, bytes(range(128)), 128)
        return 0

    cuda = SimpleNamespace(cuTensorMapEncodeTiled=ENCODE(encode))
    for element, kind, item in (("uint16", 6, 2), ("int16", 9, 2), ("float32", 11, 4)):
        for _ in range(20):  # memory lies elsewhere each time
            data = libcuda.encode_tensor_map(cuda, element, 2**40 + 16, (200, 2**33, 3), (64, 128, 1))
            assert data == bytes(range(128))
        strides = [200 * item, 200 * 2**33 * item]
        expected = (kind, 2**40 + 16, [200, 2**33, 3], strides, [64, 128, 1], [1, 1, 1], (0, 3, 3, 0), 0)
        assert calls == [expected] * 20
        calls.clear()


def test_a_tensor_map_that_is_refused_names_its_shape():
    cuda = SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 1)
    with pytest.raises(RuntimeError, match=r"refused shape \[3, 4\], box \[64, 8\]: unknown error \(1\)"):
        libcuda.encode_tensor_map(cuda, "uint16", 0, (3, 4), (64, 8))


def test_memory_is_taken_in_relaxed_mode_and_the_mode_comes_back():
    mode = [GLOBAL]

    def exchange(pointer):
        wanted = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))
        mode[0], wanted[0] = wanted[0], mode[0]
        return 0

    cuda = SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange)
    with libcuda.relaxed_capture(cuda):
        assert mode == [RELAXED]
    assert mode == [GLOBAL]


# arrays


VALUES = np.arange(24, dtype=np.float16).reshape(3, 8)


class Interface:
    """What describes itself by the CUDA array interface: the first tokens of VALUES, on the layer's GPU."""

    def __init__(self, num_tokens):
        with Gpu(DEVICE).here:
            import cupy

            self.array = cupy.asarray(VALUES[:num_tokens])
        self.shape, self.dtype = self.array.shape, self.array.dtype

    @property
    def __cuda_array_interface__(self):
        return self.array.__cuda_array_interface__


class NumbaArray(Interface):
    pass


class Tensor:
    """A tensor: with a gradient, or after it was `detach`ed."""

    is_cuda, dtype = True, "torch.float16"

    def __init__(self, num_tokens, device, detached=False):
        self.interface, self.detached = Interface(num_tokens), detached
        self.shape, self.device = self.interface.shape, SimpleNamespace(index=device)

    @property
    def __cuda_array_interface__(self):
        if not self.detached:
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad")
        return self.interface.__cuda_array_interface__

    def detach(self):
        return Tensor(len(self.interface.array), self.device.index, detached=True)

    def contiguous(self):
        return self


Tensor.__module__, NumbaArray.__module__ = "torch", "numba_cuda.numba.cuda.cudadrv.devicearray"


@pytest.mark.parametrize("num_tokens", [3, 0])
@pytest.mark.parametrize("make", [Interface, lambda num_tokens: Tensor(num_tokens, DEVICE)])
def test_tokens_are_taken_on_the_gpu_of_the_layer(gpu, cupy, make, num_tokens):
    tokens = arrays.check_gpu_tokens("x", make(num_tokens), CONFIG, gpu)
    assert tokens.storage.device.id == DEVICE
    assert tokens.storage.dtype == np.uint16
    with gpu.here:
        np.testing.assert_array_equal(tokens.storage.get().view(np.float16), VALUES[:num_tokens])
    assert cupy.cuda.runtime.getDevice() == 0


@pytest.mark.parametrize("num_tokens", [3, 0])
def test_tokens_on_another_gpu_are_refused_and_not_copied(gpu, cupy, num_tokens):
    elsewhere = cupy.empty((num_tokens, 8), np.float16)
    for x in (elsewhere, Tensor(num_tokens, 0)):
        with pytest.raises(ValueError, match="x must be on GPU 1, where this layer is; it is on GPU 0"):
            arrays.check_gpu_tokens("x", x, CONFIG, gpu)


def test_results_are_made_on_the_gpu_of_the_layer_and_of_the_tokens_kind(gpu, monkeypatch):
    import flashmoe_numba.device as device

    api = SimpleNamespace(device_array=lambda array: ("numba", array))
    monkeypatch.setitem(sys.modules, "flashmoe_numba.device.cuda_api", api)
    monkeypatch.setattr(device, "cuda_api", api, raising=False)
    y = arrays.empty_like(Interface(3), gpu)
    assert (y.device.id, y.shape, y.dtype) == (DEVICE, (3, 8), np.float16)
    kind, y = arrays.empty_like(NumbaArray(3), gpu)
    assert (kind, y.device.id) == ("numba", DEVICE)
    both = arrays.stack(Interface(3), [Interface(3), Interface(3)], gpu)
    assert (both.device.id, both.shape, both.dtype) == (DEVICE, (2, 3, 8), np.float16)
    kind, both = arrays.stack(NumbaArray(3), [Interface(3), Interface(3)], gpu)
    assert (kind, both.shape) == ("numba", (2, 3, 8))
