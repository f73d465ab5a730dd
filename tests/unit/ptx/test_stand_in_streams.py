"""The stand-in for CuPy: devices, streams, and what is captured into graphs."""

import gc
import threading

import numpy as np
import pytest
from stand_ins import make_stand_in, pinned, refused

from flashmoe_numba.ptx.stand_in.errors import CUDARuntimeError

H2D = 1
GLOBAL, THREAD_LOCAL, RELAXED = range(3)


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
