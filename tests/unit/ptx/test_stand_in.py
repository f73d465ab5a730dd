"""The stand-in for CuPy: arrays, streams and graphs, copies, launches, and memory that two processes share."""

import contextlib
import gc
import os
import threading

import ml_dtypes
import numpy as np
import pytest
from children import printed
from stand_ins import ENTRY, PlainArena, make_stand_in, nothing

from flashmoe_numba.ptx.stand_in import StandIn, modules
from flashmoe_numba.ptx.stand_in.errors import CUDARuntimeError, OutOfMemoryError

H2D, D2H = 1, 2
GLOBAL, THREAD_LOCAL, RELAXED = range(3)


@pytest.fixture
def arena():
    return PlainArena()


@pytest.fixture
def cupy(arena):
    stand_in = make_stand_in(arena=arena)
    yield stand_in
    stand_in.close()


@pytest.fixture
def stream(cupy):
    return cupy.cuda.Stream(non_blocking=True)


def refused(name):
    return pytest.raises(CUDARuntimeError, match=f"^{name}: ")


# arrays


def test_only_what_was_written_counts_as_written(cupy, arena):
    empty, zeros, copied = cupy.empty(6, np.float32), cupy.zeros((2, 3), np.float32), cupy.asarray(np.arange(6))
    assert [bool(arena.is_written(array).any()) for array in (empty, zeros, copied)] == [False, True, True]
    assert np.isnan(empty.get()).all() and not zeros.get().any() and copied.get().tolist() == list(range(6))
    empty[2:4] = 1
    assert arena.is_written(empty).reshape(6, 4).all(axis=1).tolist() == [False, False, True, True, False, False]


def test_writes_to_what_is_not_contiguous_are_told_row_by_row(cupy, arena):
    array = cupy.empty((3, 4), np.int16)
    array[:, 1:3] = np.array([[1, 2], [3, 4], [5, 6]], np.int16)
    array[0, 0] = 9
    written = arena.is_written(array).reshape(3, 4, 2)
    assert written.all(axis=2).tolist() == [[True, True, True, False], *[[False, True, True, False]] * 2]
    assert array.get()[:, 1:3].tolist() == [[1, 2], [3, 4], [5, 6]] and array.get()[0, 0] == 9


def test_the_granule_is_the_size_of_an_element(arena):
    cupy = make_stand_in(arena=arena, segment_granule=4)
    arrays = [cupy.empty(8, dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.int64, complex)]
    assert [arena.granules[array.data.ptr] for array in arrays] == [2, 2, 4, 8, 8]
    assert arena.granules[cupy.empty(8, np.uint8).data.ptr] == 4


def test_parts_and_views_are_in_the_same_memory(cupy):
    array = cupy.asarray(np.arange(24, dtype=np.int64).reshape(4, 6))
    part = array[1:3]
    assert (part.shape, part.size, len(part), part.ndim) == ((2, 6), 12, 2, 2)
    assert part.data.ptr == array.data.ptr + 48 and part.device.id == array.device.id
    assert array.reshape(-1)[7].get() == 7 and array.view(np.int32).shape == (4, 12)
    part[...] = 5
    assert array.get().sum() == 5 * 12 + sum(range(6)) + sum(range(18, 24))
    for copy in (lambda: array[:, :5].reshape(-1), lambda: array[[0, 1]]):
        with pytest.raises(NotImplementedError, match="is not copied by"):
            copy()


def test_bfloat16(cupy):
    values = np.arange(4).astype(ml_dtypes.bfloat16)
    array = cupy.asarray(values)
    assert array.dtype == values.dtype and array.get().tolist() == values.tolist()
    assert array.view(np.int16).get().tolist() == values.view(np.int16).tolist()


def test_no_array_becomes_numpys_by_itself(cupy):
    assert not isinstance(cupy.empty(1), np.ndarray)
    with pytest.raises(TypeError, match="does not become a NumPy array by itself"):
        np.asarray(cupy.zeros(2))
    with pytest.raises(NotImplementedError, match="no DLPack"):
        cupy.from_dlpack(np.zeros(2))


def test_an_array_is_given_back_when_nobody_shows_it(cupy, arena):
    part = cupy.zeros(100, np.int64)[3:5]
    address = part.data.ptr - 24
    gc.collect()
    assert address in arena.taken
    del part
    gc.collect()
    assert not arena.taken and cupy.cuda.runtime.memGetInfo() == (1 << 30, 1 << 30)


def test_what_describes_itself_is_taken_where_it_is(cupy):
    class Described:
        def __init__(self, array):
            self.__cuda_array_interface__ = array.__cuda_array_interface__

    with cupy.cuda.Device(1):
        array = cupy.asarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    for shown in (array, array[:, 1:3]):
        same = cupy.asarray(Described(shown))
        assert (same.data.ptr, same.device.id, same.strides) == (shown.data.ptr, 1, shown.strides)
        np.testing.assert_array_equal(same._values, shown._values)
    empty = cupy.asarray(Described(cupy.empty((0, 4), np.float32)))
    assert empty.shape == (0, 4) and empty.data.ptr == 0
    gone = Described(cupy.zeros(3))
    gc.collect()
    with refused("cudaErrorInvalidValue"):
        cupy.asarray(gone)


def test_arrays_of_another_device_are_refused(cupy):
    with cupy.cuda.Device(1):
        array = cupy.zeros((2, 2))
    for verb in (cupy.asarray, cupy.ascontiguousarray, lambda array: cupy.stack([array])):
        with pytest.raises(ValueError, match="an array of device 1 is used on the current device 0"):
            verb(array)


def test_memory_runs_out(cupy, arena):
    small = make_stand_in(arena=arena, memory_bytes=100)
    held = small.zeros(8, np.int64)
    with pytest.raises(OutOfMemoryError, match="device 0 has 36 bytes left, and needs 40"):
        small.empty(5, np.int64)
    with small.cuda.Device(1):
        small.empty(5, np.int64)
    with refused("cudaErrorMemoryAllocation"):
        small.cuda.runtime.malloc(64)
    segment = small.cuda.runtime.malloc(20)
    assert small.cuda.runtime.memGetInfo() == (16, 100)
    small.cuda.runtime.free(segment)
    assert small.cuda.runtime.memGetInfo() == (36, 100)
    with pytest.raises(OutOfMemoryError, match="no room for array"):
        cupy.empty(arena.bytes.size, np.uint8)
    assert held.size == 8


# copies


def pinned(cupy, size, dtype=np.int64):
    values = np.frombuffer(cupy.cuda.PinnedMemoryPool().malloc(size * np.dtype(dtype).itemsize), dtype, size)
    values[:] = np.arange(size)
    return values


def test_copies_count_as_writes_of_the_host(cupy, arena, stream):
    array, values = cupy.empty(6, np.int64), pinned(cupy, 4)
    cupy.cuda.runtime.memcpyAsync(array.data.ptr + 8, values.ctypes.data, 32, H2D, stream.ptr)
    assert arena.is_written(array).reshape(6, 8).all(axis=1).tolist() == [False, True, True, True, True, False]
    values[:] = -1
    cupy.cuda.runtime.memcpyAsync(values.ctypes.data, array.data.ptr + 16, 24, D2H, stream.ptr)
    assert values.tolist() == [1, 2, 3, -1]


def test_copies_of_rows(cupy, arena):
    array, values = cupy.empty((2, 3), np.int64), pinned(cupy, 6)
    target, source = array.data.ptr + 8, values.ctypes.data + 8
    cupy.cuda.runtime.memcpy2DAsync(target, 24, source, 24, 16, 2, H2D, 0)
    assert array.get()[:, 1:].tolist() == [[1, 2], [4, 5]]
    assert arena.is_written(array).reshape(2, 3, 8).all(axis=2).tolist() == [[False, True, True]] * 2
    with refused("cudaErrorInvalidPitchValue"):
        cupy.cuda.runtime.memcpy2DAsync(target, 24, source, 8, 16, 2, H2D, 0)


def test_copies_outside_of_an_allocation_are_refused(cupy):
    copy, array, values = cupy.cuda.runtime.memcpyAsync, cupy.zeros(2, np.int64), pinned(cupy, 4)
    loose = np.zeros(4, np.int64)
    for target, source, kind in (
        (array.data.ptr, values.ctypes.data, H2D),  # 24 bytes into 16
        (values.ctypes.data, array.data.ptr + 8, D2H),
        (array.data.ptr, loose.ctypes.data, H2D),
        (loose.ctypes.data, array.data.ptr, D2H),
        (values.ctypes.data, array.data.ptr, H2D),  # the wrong way round
        (array.data.ptr, values.ctypes.data, 4),
    ):
        with refused("cudaErrorInvalidValue"):
            copy(target, source, 8 if loose.ctypes.data in (target, source) or kind == 4 else 24, kind, 0)


def test_page_locked_memory_is_gone_when_nobody_holds_it(cupy):
    array, values = cupy.zeros(2, np.int64), pinned(cupy, 2)
    source = values.ctypes.data
    del values
    gc.collect()
    with refused("cudaErrorInvalidValue"):
        cupy.cuda.runtime.memcpyAsync(array.data.ptr, source, 16, H2D, 0)


# streams and devices


def test_what_is_current_belongs_to_a_thread(cupy, stream):
    current = cupy.cuda.get_current_stream
    seen = []
    with cupy.cuda.Device(1), stream_on(cupy, 1) as inner:
        thread = threading.Thread(target=lambda: seen.append((cupy.cuda.runtime.getDevice(), current(1).ptr)))
        thread.start()
        thread.join()
        assert (cupy.cuda.runtime.getDevice(), current().ptr, current(0).ptr) == (1, inner.ptr, 0)
    assert seen == [(0, 0)] and (cupy.cuda.runtime.getDevice(), current(1).ptr) == (0, 0)


def stream_on(cupy, device):
    with cupy.cuda.Device(device):
        return cupy.cuda.Stream(non_blocking=True)


def test_a_stream_belongs_to_its_device_and_goes_with_its_object(cupy, stream):
    other = stream_on(cupy, 1)
    for use in (other.is_capturing, other.synchronize, other.__enter__, lambda: cupy.cuda.Event().record(other)):
        with refused("cudaErrorInvalidResourceHandle"):
            use()
    address = stream.ptr
    with refused("cudaErrorInvalidResourceHandle"):
        cupy.cuda.Stream.of(address + 1).synchronize()
    assert cupy.cuda.Stream.from_external(stream).ptr == address
    with refused("cudaErrorInvalidDevice"):
        cupy.cuda.Device(2)


def test_devices_and_their_names(cupy):
    runtime = cupy.cuda.runtime
    ids = [runtime.deviceGetPCIBusId(device) for device in range(runtime.getDeviceCount())]
    assert [runtime.deviceGetByPCIBusId(bus_id) for bus_id in ids] == [0, 1]
    assert [runtime.deviceCanAccessPeer(0, peer) for peer in (0, 1)] == [0, 1]
    alone = make_stand_in(num_devices=1, peers=False).cuda.runtime
    assert alone.getDeviceCount() == 1 and alone.deviceCanAccessPeer(0, 1) == 0
    with refused("cudaErrorInvalidDevice"):
        alone.deviceGetByPCIBusId(ids[1])


@pytest.mark.parametrize(
    ("how", "rule"),
    [
        (dict(num_devices=3), r"num_devices must be in \[1, 2\], got 3"),
        (dict(multiprocessors=0), "multiprocessors must be at least 1, got 0"),
        (dict(capability=(7, 5)), r"no kernel for compute capability 7\.5"),
    ],
)
def test_a_stand_in_that_cannot_be(how, rule):
    with pytest.raises(ValueError, match=rule):
        make_stand_in(**how)


# captures


def test_a_captured_stream_does_its_work_when_the_graph_is_launched(cupy, stream):
    array, values = cupy.zeros(2, np.int64), pinned(cupy, 2)
    with stream:
        stream.begin_capture()
        assert stream.is_capturing()
        cupy.cuda.runtime.memcpyAsync(array.data.ptr, values.ctypes.data, 16, H2D, stream.ptr)
        doubled = cupy.stack([array, array])
        array[...] = 7
        graph = stream.end_capture()
    assert not stream.is_capturing() and array.get().tolist() == [0, 0]
    for first in (3, 5):
        values[0] = first
        graph.launch(stream)
        assert doubled.get().tolist() == [[first, 1]] * 2 and array.get().tolist() == [7, 7]


def test_other_streams_go_on_meanwhile(cupy, stream):
    other, array = cupy.cuda.Stream(non_blocking=True), cupy.zeros(1, np.int64)
    stream.begin_capture()
    with other:
        array[...] = 4
        assert array.get() == 4
    stream.end_capture()


def event_outside(cupy, stream):
    event = cupy.cuda.Event()
    event.record(cupy.cuda.Stream(non_blocking=True))
    stream.wait_event(event)


def ask_event(cupy, stream):
    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    return event.done


FORBIDDEN = {
    "stream": ("cudaErrorStreamCaptureUnsupported", lambda cupy, stream: stream.synchronize()),
    "device": ("cudaErrorStreamCaptureUnsupported", lambda cupy, stream: cupy.cuda.Device().synchronize()),
    "host": ("cudaErrorStreamCaptureUnsupported", lambda cupy, stream: get_in(cupy.zeros(1), stream)),
    "waiting": ("cudaErrorStreamCaptureIsolation", event_outside),
    "asking": ("cudaErrorCapturedEvent", ask_event),
}


def get_in(array, stream):
    with stream:
        return array.get()


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_a_capture_forbids_breaks_it(cupy, stream, what):
    name, verb = FORBIDDEN[what]
    stream.begin_capture()
    with refused(name):
        verb(cupy, stream)
    with refused("cudaErrorStreamCaptureInvalidated"):
        cupy.cuda.Event().record(stream)
    with refused("cudaErrorStreamCaptureInvalidated"):
        stream.end_capture()
    stream.begin_capture()
    stream.end_capture()


def test_the_legacy_stream_cannot_be_used_beside_a_blocking_one_that_is_captured(cupy):
    blocking = cupy.cuda.Stream()
    blocking.begin_capture()
    with refused("cudaErrorStreamCaptureImplicit"):
        cupy.zeros(1)
    with pytest.raises(CUDARuntimeError, match="cannot be captured"):
        cupy.cuda.Stream(null=True).begin_capture()


@pytest.mark.parametrize(
    ("of_capture", "of_thread", "own", "allowed"),
    [
        (RELAXED, GLOBAL, True, True),
        (GLOBAL, GLOBAL, True, False),
        (GLOBAL, RELAXED, True, True),
        (THREAD_LOCAL, GLOBAL, True, False),
        (THREAD_LOCAL, THREAD_LOCAL, True, False),
        (GLOBAL, GLOBAL, False, False),
        (GLOBAL, THREAD_LOCAL, False, True),
        (THREAD_LOCAL, GLOBAL, False, True),
        (GLOBAL, RELAXED, False, True),
    ],
)
def test_memory_is_taken_during_a_capture_as_far_as_the_modes_allow(cupy, stream, of_capture, of_thread, own, allowed):
    begin = threading.Thread(target=stream.begin_capture, args=(of_capture,))
    begin.run() if own else (begin.start(), begin.join())
    cupy.queues.exchange_mode(of_thread)
    for take in (lambda: cupy.empty(1), lambda: cupy.cuda.PinnedMemoryPool().malloc(8)):
        if allowed:
            take()
        else:
            with refused("cudaErrorStreamCaptureUnsupported"):
                take()


def test_a_graph_holds_no_memory(cupy, stream):
    """As a real one: a replay that needs what was let go is found."""
    array, values = cupy.zeros(2, np.int64), pinned(cupy, 2)
    with stream:
        stream.begin_capture()
        cupy.cuda.runtime.memcpyAsync(array.data.ptr, values.ctypes.data, 16, H2D, stream.ptr)
        graph = stream.end_capture()
        graph.launch()
        del values
        gc.collect()
        with pytest.raises(CUDARuntimeError, match="must be page-locked memory of the host, and still be held"):
            graph.launch()


@pytest.mark.parametrize("lost", ["array", "both"])
def test_a_graph_does_not_read_or_write_arrays_that_were_let_go(cupy, stream, lost):
    kept = {"array": cupy.zeros(2, np.int64)}
    with stream:
        stream.begin_capture()
        kept["both"] = cupy.stack([kept["array"]])
        graph = stream.end_capture()
        graph.launch()
        del kept[lost]
        gc.collect()
        with refused("cudaErrorInvalidValue"):
            graph.launch()


# launches


def launcher(cupy):
    return cupy.RawModule(path="a.cubin", enable_cooperative_groups=True).get_function(ENTRY)


def test_launches_are_in_order_with_copies_and_in_graphs(arena):
    seen = []
    cupy = make_stand_in(lambda *launch: seen.append((launch, int(array.get()[0]))), arena)
    stream, array = cupy.cuda.Stream(non_blocking=True), cupy.zeros(1, np.int64)
    function = launcher(cupy)
    with stream:
        stream.begin_capture()
        array[...] = 3
        function((4,), (128,), (np.int64(array.data.ptr), np.int64(-1)), shared_mem=64)
        graph = stream.end_capture()
    function((1,), (32,), ())
    graph.launch()
    text = f".visible .entry {ENTRY}("
    assert seen == [((text, ENTRY, 1, 32, (), 0), 0), ((text, ENTRY, 4, 128, (array.data.ptr, -1), 64), 3)]


def test_all_get_the_same_function_on_a_device(cupy):
    first, again = launcher(cupy), launcher(cupy)
    assert first is again and first.max_dynamic_shared_size_bytes == 48 << 10
    with cupy.cuda.Device(1):
        assert launcher(cupy) is not first
    with refused("cudaErrorSymbolNotFound"):
        cupy.RawModule(path="a.cubin", enable_cooperative_groups=True).get_function("kern")
    with pytest.raises(NotImplementedError, match="cooperative launches only"):
        cupy.RawModule(path="a.cubin")


def test_launches_that_do_not_fit(cupy):
    function = launcher(cupy)
    with refused("cudaErrorInvalidValue"):
        function((1,), (32,), (), shared_mem=(48 << 10) + 1)
    function.max_dynamic_shared_size_bytes = 227 << 10
    function((2,), (32,), (), shared_mem=227 << 10)
    with refused("cudaErrorCooperativeLaunchTooLarge"):
        function((3,), (32,), (), shared_mem=227 << 10)
    function((4,), (32,), ())
    with refused("cudaErrorCooperativeLaunchTooLarge"):
        function((5,), (32,), ())
    with refused("cudaErrorInvalidValue"):
        function.max_dynamic_shared_size_bytes = (227 << 10) + 1
    with pytest.raises(TypeError, match=r"arguments must be np\.int64, got"):
        function((1,), (32,), (7,))


def test_the_text_lies_beside_the_cubin(tmp_path):
    (tmp_path / "a.ptx").write_text(".entry k(", encoding="utf-8")
    assert modules.text_beside(str(tmp_path / "a.cubin")) == ".entry k("
    module = StandIn(PlainArena(), nothing).RawModule(str(tmp_path / "a.cubin"), enable_cooperative_groups=True)
    assert module.get_function("k").kernel.ptr


# memory of two processes


@pytest.fixture
def held():
    """The files in shared memory that this process has opened since the test began: links into the folder."""
    before = in_shared_memory()
    return lambda: sorted(in_shared_memory() - before)


def in_shared_memory():
    links = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one of the listing
            links.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return {link for link in links if link.startswith("/dev/shm/")}


PEER = """
import sys, numpy as np
from stand_ins import make_stand_in
cupy = make_stand_in()
runtime = cupy.cuda.runtime
address = runtime.ipcOpenMemHandle(bytes.fromhex(sys.argv[1]))
memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, 64, None, 0), 0)
words = cupy.ndarray(8, np.int64, memory)
print(words.get().tolist(), cupy.foreign == [(address, 4096)])
words[2:4] = 9
runtime.ipcCloseMemHandle(address)
assert cupy.foreign == []
try:
    words[0] = 1
except runtime.CUDARuntimeError as error:
    print(str(error).split(":")[0])
"""


def test_a_segment_is_mapped_by_another_process_and_leaves_nothing(held, cupy, tmp_path):
    runtime = cupy.cuda.runtime
    address = runtime.malloc(4096)
    segment = cupy.ndarray(8, np.int64, pointer(cupy, address, 64))
    segment[...] = np.arange(8)
    handle = runtime.ipcGetMemHandle(address)
    assert len(handle) == 64 and cupy.foreign == [(address, 4096)]
    assert held() and all(link.endswith("(deleted)") for link in held()), "a file without a name"
    script = tmp_path / "peer.py"
    script.write_text(PEER, encoding="utf-8")
    assert printed(script, handle.hex()).split("\n")[:2] == [
        "[0, 1, 2, 3, 4, 5, 6, 7] True",
        "cudaErrorInvalidValue",
    ]
    assert segment.get().tolist() == [0, 1, 9, 9, 4, 5, 6, 7]
    runtime.free(address)
    del segment
    assert cupy.foreign == [] and held() == []


def pointer(cupy, address, num_bytes):
    return cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, num_bytes, None, 0), 0)


def test_segments_that_nobody_freed_go_with_the_stand_in(held, arena):
    cupy = make_stand_in(arena=arena)
    [cupy.cuda.runtime.malloc(4096) for _ in range(3)]
    assert len(held()) >= 3
    cupy.close()
    assert cupy.foreign == [] and held() == []


def test_handles_that_cannot_be_opened(cupy):
    runtime = cupy.cuda.runtime
    address = runtime.malloc(4096)
    with refused("cudaErrorDeviceUninitialized"):
        runtime.ipcOpenMemHandle(runtime.ipcGetMemHandle(address))
    for use in (
        lambda: runtime.ipcOpenMemHandle(b"/proc/1/fd/none".ljust(64, b"\0")),
        lambda: runtime.ipcGetMemHandle(cupy.zeros(1).data.ptr),
        lambda: runtime.ipcCloseMemHandle(address),
        lambda: runtime.free(address + 8),
        lambda: cupy.ndarray(8, np.uint8, pointer(cupy, address + 4090, 8)),
    ):
        with refused("cudaErrorInvalidValue"):
            use()
