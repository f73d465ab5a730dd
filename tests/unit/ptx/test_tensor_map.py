"""Tensor maps: their words, and every rule of the driver's page broken once."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from stand_ins import make_stand_in

from flashmoe_numba.gpu import libcuda
from flashmoe_numba.ptx import tensor_map as t
from flashmoe_numba.ptx.tensor_map import TensorMap, decode

GOOD = dict(
    data_type=6, address=1 << 20, sizes=(64, 48, 3), strides=(128, 128 * 48), box=(64, 16, 1), steps=(1, 1, 1),
    swizzle=t.SWIZZLE_128B, l2=3,
)  # fmt: skip
INTERLEAVED = dict(GOOD, interleave=t.INTERLEAVE_32B, swizzle=t.SWIZZLE_32B)


def map_of(how, **changes):
    return TensorMap(**(how | changes))


def test_words_are_where_they_are_said_to_be():
    words = map_of(GOOD, address=(1 << 40) + 16, sizes=(64, 1 << 32, 3), strides=(128, 1 << 39), fill=1).words()
    assert words[t.MAGIC] == int.from_bytes(b"tnsormap", "little")
    assert words[t.DATA_TYPE : t.ADDRESS + 1].tolist() == [6, 3, (1 << 40) + 16]
    assert words[t.SIZE : t.SIZE + 5].tolist() == [64, 1 << 32, 3, 0, 0]
    assert words[t.STRIDE : t.STRIDE + 4].tolist() == [128, 1 << 39, 0, 0]
    assert words[t.BOX] == 64 + (16 << 12) + (1 << 24)
    assert words[t.STEPS] == 0x111
    assert words[t.MODES] == 0x03_00_01_03
    assert words.size == 16 and words.dtype == np.int64


@pytest.mark.parametrize(
    "how",
    [
        GOOD,
        INTERLEAVED,
        dict(GOOD, box=(8, 256, 256), steps=(1, 8, 5), swizzle=0),
        dict(GOOD, sizes=(5,), strides=(), box=(8,), steps=(1,)),
        dict(GOOD, data_type=11, sizes=(8, 7, 6, 5, 4), strides=(32, 224, 1344, 6720), box=(32,) * 5, steps=(1,) * 5),
    ],
)
def test_a_map_is_read_as_it_was_written(how):
    again = decode(map_of(how).words())
    for name, value in how.items():
        assert tuple(np.atleast_1d(getattr(again, name))) == tuple(np.atleast_1d(value)), name


def test_the_stride_of_the_innermost_dimension_is_ignored_unless_interleaved():
    assert t.element_stride(map_of(GOOD, steps=(0, 1, 1)).words(), 0) == 1
    assert t.element_stride(map_of(INTERLEAVED, steps=(2, 1, 1)).words(), 0) == 2


def test_bytes_that_are_no_map_are_told_apart():
    with pytest.raises(ValueError, match="to be a tensor map, got 0x0"):
        decode(np.zeros(16, np.int64))


RULES = [
    (GOOD, dict(data_type=13), "data_type must be in"),
    (GOOD, dict(data_type=-1), "data_type must be in"),
    (GOOD, dict(interleave=3), "interleave must be in"),
    (GOOD, dict(swizzle=7), "swizzle must be in"),
    (GOOD, dict(l2=4), "l2 must be in"),
    (GOOD, dict(fill=2), "fill must be in"),
    (INTERLEAVED, dict(swizzle=t.SWIZZLE_128B), "swizzle must be that of 32 bytes"),
    (GOOD, dict(data_type=1, fill=1), "fill must be zero unless elements are floating point"),
    (GOOD, dict(sizes=(), strides=(), box=(), steps=()), r"rank must be in \[1, 5\], got 0"),
    (GOOD, dict(sizes=(8,) * 6), r"rank must be in \[1, 5\], got 6"),
    (INTERLEAVED, dict(sizes=(64, 48)), r"rank must be in \[3, 5\], got 2"),
    (GOOD, dict(strides=(128,)), "strides must have 2 entries"),
    (GOOD, dict(box=(64, 16)), "box must have 3 entries"),
    (GOOD, dict(steps=(1,)), "steps must have 3 entries"),
    (GOOD, dict(address=(1 << 20) + 8), "address must be a multiple of 16"),
    (INTERLEAVED, dict(address=(1 << 20) + 16), "address must be a multiple of 32"),
    (GOOD, dict(sizes=(64, 0, 3)), "sizes must be in"),
    (GOOD, dict(sizes=(64, 48, (1 << 32) + 1)), "sizes must be in"),
    (GOOD, dict(strides=(136, 136 * 48)), "strides must be multiples of 16 below"),
    (INTERLEAVED, dict(strides=(144, 144 * 48)), "strides must be multiples of 32 below"),
    (GOOD, dict(strides=(128, 1 << 40)), "strides must be multiples of 16 below"),
    (GOOD, dict(strides=(112, 112 * 48)), "each stride must hold the dimension below it"),
    (GOOD, dict(strides=(128, 128 * 47)), "each stride must hold the dimension below it"),
    (GOOD, dict(strides=(128, 128 * 48 + 16)), "a multiple of that one's stride"),
    (GOOD, dict(box=(64, 0, 1)), "box must be in"),
    (GOOD, dict(box=(64, 257, 1)), "box must be in"),
    (GOOD, dict(steps=(1, 0, 1)), "steps must be in"),
    (GOOD, dict(steps=(1, 1, 9)), "steps must be in"),
    (INTERLEAVED, dict(steps=(0, 1, 1)), "steps must be in"),
    (GOOD, dict(box=(12, 16, 1)), "inner extent must be a multiple of 16 bytes, got 24"),
    (GOOD, dict(box=(72, 16, 1)), "inner extent must be at most the swizzle's 128 bytes, got 144"),
    (GOOD, dict(box=(40, 16, 1), swizzle=t.SWIZZLE_64B), "at most the swizzle's 64 bytes, got 80"),
    (GOOD, dict(box=(24, 16, 1), swizzle=t.SWIZZLE_32B), "at most the swizzle's 32 bytes, got 48"),
]


@pytest.mark.parametrize(("how", "changes", "rule"), RULES)
def test_what_the_driver_refuses(how, changes, rule):
    map_of(how)
    with pytest.raises(ValueError, match=rule):
        map_of(how, **changes)


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        (GOOD, dict(strides=(256, 256 * 50))),
        (GOOD, dict(box=(72, 16, 1), swizzle=0)),
        (INTERLEAVED, dict(box=(72, 16, 1))),
        (GOOD, dict(address=(1 << 20) + 16)),
        (GOOD, dict(data_type=0, swizzle=6)),
    ],
)
def test_what_the_driver_takes(how, changes):
    map_of(how, **changes)


# the driver


def encode(library, *, place=None, rank=3, **changes):
    """Called by ctypes, as the house does; (what it answers, the 16 words)."""
    how = dict(address=4096, sizes=(64, 48, 3), strides=(128, 128 * 48), box=(64, 16, 1)) | changes
    room = np.zeros(32, np.int64)
    at = room.ctypes.data + -room.ctypes.data % 64
    code = library.cuTensorMapEncodeTiled(
        ctypes.c_void_p(at if place is None else at + place), ctypes.c_int(6), ctypes.c_uint32(rank),
        ctypes.c_void_p(how["address"]), (ctypes.c_uint64 * 3)(*how["sizes"]), (ctypes.c_uint64 * 2)(*how["strides"]),
        (ctypes.c_uint32 * 3)(*how["box"]), (ctypes.c_uint32 * 3)(1, 1, 1),
        *map(ctypes.c_int, (0, t.SWIZZLE_128B, 3, 0)),
    )  # fmt: skip
    return code, room[(at - room.ctypes.data) // 8 :][:16]


def test_the_driver_writes_words_or_says_invalid():
    library = make_stand_in().library
    code, words = encode(library)
    assert code == 0 and decode(words) == decode(map_of(GOOD, address=4096).words())
    for changes in (dict(place=32), dict(rank=0), dict(rank=6), dict(address=8), dict(box=(64, 257, 1))):
        code, words = encode(library, **changes)
        assert code == 1 and not words.any(), changes
    assert encode(make_stand_in(capability=(8, 0)).library)[0] == 801


def test_the_house_encodes_maps_with_it():
    library = make_stand_in().library
    for element, kind in (("uint16", 6), ("int16", 9), ("float32", 11)):
        words = np.frombuffer(libcuda.encode_tensor_map(library, element, 4096, (32, 7, 2), (8, 4, 1)), np.int64)
        found = decode(words)
        assert (found.data_type, found.sizes, found.box) == (kind, [32, 7, 2], [8, 4, 1])
        assert (found.swizzle, found.fill, found.interleave, found.l2) == (3, 0, 0, 3)
    with pytest.raises(RuntimeError, match=r"refused shape \[3, 4\], box \[64, 8\]: invalid argument \(1\)"):
        libcuda.encode_tensor_map(library, "uint16", 0, (3, 4), (64, 8))
    assert "strides must be multiples of 16" in library.refused


def test_the_mode_of_captures_is_exchanged():
    stand_in, mode = make_stand_in(), SimpleNamespace()
    with libcuda.relaxed_capture(stand_in.library):
        mode.inside = stand_in.queues.exchange_mode(2)
    assert mode.inside == 2 and stand_in.queues.exchange_mode(0) == 0
