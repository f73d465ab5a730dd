"""The vocabulary: what a config accepts, and the geometry of segments and row tiles."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from reference import (
    DTYPES,
    Layout,
    MoEConfig,
    Weights,
    Write,
    element_dtype,
    num_row_blocks,
    tile_height,
    write_conflicts,
)
from reference.arrays import check_seed
from reference.layout import DISPATCH, RESULT


def make_config(**fields):
    return MoEConfig(**(dict(num_ranks=3, num_tokens=7, hidden=5, ffn=4, num_experts=6, num_topk=2) | fields))


@pytest.mark.parametrize("dtype", [*DTYPES, np.float32, np.dtype("float16"), np.float64, element_dtype("bfloat16")])
def test_numpy_scalars_and_types_are_kept_as_pythons(dtype):
    given = dict(num_ranks=np.int64(3), num_tokens=np.uint8(7), hidden=np.array(5), ffn=np.int16(4))
    config = make_config(**given, gated=np.bool_(True), capacity=np.int32(2), activation=np.str_("relu"), dtype=dtype)
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    plain = make_config(gated=True, capacity=2, activation="relu", dtype=name)
    assert config == plain and hash(config) == hash(plain) and repr(config) == repr(plain)
    assert json.dumps(asdict(config)) == json.dumps(asdict(plain))
    assert {type(value) for value in asdict(config).values()} == {int, bool, str, type(None)}


def test_seeds_may_be_numpy_integers():
    config = make_config()
    for seed in (np.int64(3), np.uint8(3), np.array(3)):
        np.testing.assert_array_equal(Weights.random(config, seed=seed).router, Weights.random(config, seed=3).router)
    for seed in (np.bool_(True), np.float32(3)):
        with pytest.raises(TypeError, match="seed must be an integer"):
            Weights.random(config, seed=seed)
    assert type(check_seed(np.int64(3))) is int


@pytest.mark.parametrize(("fields", "error", "message"), [
    ({"num_topk": 7}, ValueError, r"num_topk must be in \[1, num_experts=6\], got 7"),
    ({"num_ranks": 4}, ValueError, "num_experts must be a multiple of num_ranks=4, got 6"),
    ({"hidden": 0}, ValueError, r"hidden must be in \[1, .*\], got 0"),
    ({"hidden": 2.0}, TypeError, "hidden must be an integer, got 2.0"),
    ({"num_tokens": True}, TypeError, "num_tokens must be an integer, got True"),
    ({"gated": 1}, TypeError, "gated must be True or False, got 1"),
    ({"activation": "tanh"}, ValueError, "activation must be one of .*; got 'tanh'"),
    ({"dtype": 16}, TypeError, "dtype must be a string, one of .*; got 16"),
    ({"dtype": None}, TypeError, "dtype must be a string, one of .*; got None"),
    ({"dtype": np.int32}, ValueError, "dtype must be one of .*; got 'int32'"),
    ({"dtype": np.dtype("float32").newbyteorder()}, ValueError, "dtype must be one of .*; got '.f4'"),
    ({"num_topk": np.bool_(True)}, TypeError, "num_topk must be an integer, got True"),
    ({"hidden": np.float32(2)}, TypeError, "hidden must be an integer, got 2.0"),
    ({"renormalize": np.int64(1)}, TypeError, "renormalize must be True or False, got 1"),
    ({"capacity": np.int64(8)}, ValueError, r"capacity must be in \[1, num_tokens=7\] or None, got 8"),
    ({"num_tokens": 2**30}, ValueError, r"num_tokens must be in \[1, 1073741823\] for num_topk=2, got 1073741824"),
    ({"dtype": "int8"}, ValueError, "dtype must be one of .*; got 'int8'"),
    ({"capacity": 8}, ValueError, r"capacity must be in \[1, num_tokens=7\] or None, got 8"),
    ({"capacity": 0}, ValueError, "capacity must be in"),
    ({"tile_m": 96}, ValueError, "tile_m must be tile_m_min=16 times a power of two, got 96"),
    ({"tile_m": 8}, ValueError, "tile_m must be tile_m_min=16 times a power of two, got 8"),
])  # fmt: skip
def test_config_rejects(fields, error, message):
    with pytest.raises(error, match=message):
        make_config(**fields)


def test_derived_sizes():
    config = make_config(capacity=3, dtype="bfloat16")
    assert (config.num_experts_per_rank, config.slots, make_config().slots) == (2, 3, 7)
    assert [config.owner(expert) for expert in range(6)] == [0, 0, 1, 1, 2, 2]
    assert config.numpy_dtype.itemsize == 2 and config.accumulator == np.float32
    assert make_config(dtype="float64").accumulator == np.float64


def test_tile_heights():
    assert [tile_height(rows, 16, 64) for rows in (0, 1, 16, 17, 32, 33, 64, 65, 1000)] == [16] * 3 + [32] * 2 + [
        64
    ] * 4
    assert [num_row_blocks(rows, 16, 64) for rows in (0, 1, 64, 65, 128, 129)] == [0, 1, 1, 2, 2, 3]


def test_regions_do_not_overlap_and_fill_the_segment():
    layout = Layout(make_config(tile_m=4, tile_m_min=2))
    starts = [
        layout.dispatch,
        layout.result,
        layout.dispatch_flag,
        layout.result_flag,
        layout.control,
        layout.num_bytes,
    ]
    sizes = [3 * 2 * 7 * 5 * 4, 3 * 2 * 7 * 5 * 4, 3 * 2 * 2 * 8, 6 * 2 * 8, 32 * 8]
    assert layout.row_blocks == 2 and all(start % 128 == 0 for start in starts)
    for start, size, end in zip(starts[:-1], sizes, starts[1:], strict=True):
        assert start + size <= end < start + size + 128


def test_every_row_has_its_own_offset():
    config = make_config()
    layout = Layout(config)
    writes = [
        Write(p, s, r, p, e, c) for s in range(3) for r in (0, 1) for p in range(3) for e in range(2) for c in range(7)
    ]
    assert all(layout.is_valid(write) for write in writes) and write_conflicts(layout, writes) == []
    offsets = sorted(layout.offset(write)[1] for write in writes if write.segment == 1)
    assert offsets[41] + 20 <= layout.result == offsets[42] and np.diff(offsets).min() == 20


def test_invalid_writes_and_conflicts():
    layout, good = Layout(make_config()), Write(1, 2, RESULT, 1, 0, 6)
    for field, value in (("segment", 3), ("round", 2), ("peer", 0), ("expert", 2), ("slot", 7), ("slot", -1)):
        assert not layout.is_valid(good._replace(**{field: value})), field
    liar = good._replace(writer=0)
    assert write_conflicts(layout, [good, liar, good._replace(round=DISPATCH)]) == [(good, liar)]
