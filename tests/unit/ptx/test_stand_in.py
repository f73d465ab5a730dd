"""The stand-in for CuPy: arrays, and copies."""

import contextlib
import gc

import ml_dtypes
import numpy as np
import pytest
from stand_ins import make_stand_in, pinned, refused

from flashmoe_numba.ptx.stand_in.errors import CUDARuntimeError, OutOfMemoryError

H2D, D2H = 1, 2


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


def test_arrays_of_another_stand_in_are_refused(cupy):
    with contextlib.closing(make_stand_in()) as other:
        array = other.zeros((2, 3), np.float32)
    for use in (cupy.asarray, cupy.ascontiguousarray, lambda x: cupy.stack([x])):
        with pytest.raises(ValueError, match="x must be an array of this stand-in for CuPy, got one of another"):
            use(array)


def test_nothing_works_after_the_end():
    with contextlib.closing(make_stand_in()) as cupy:
        array = cupy.zeros(3)
    for use in (array.get, lambda: array.__setitem__(0, 1), lambda: cupy.zeros(3), cupy.cuda.Stream().synchronize):
        with pytest.raises(CUDARuntimeError, match=r"^cudaErrorLaunchFailure: this GPU has ended"):
            use()


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
