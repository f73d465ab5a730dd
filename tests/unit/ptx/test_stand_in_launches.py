"""The stand-in for CuPy: launches, and memory that two processes share."""

import contextlib
import os

import numpy as np
import pytest
from children import printed
from stand_ins import ENTRY, TEXT, PlainArena, make_stand_in, nothing, refused

from flashmoe_numba.ptx.stand_in import StandIn, modules

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
    assert seen == [((TEXT, ENTRY, 1, 32, (), 0), 0), ((TEXT, ENTRY, 4, 128, (array.data.ptr, -1), 64), 3)]


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
