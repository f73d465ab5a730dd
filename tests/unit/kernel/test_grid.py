"""A launch for many ranks, as the cuda backend makes it, interpreted: table, records, lanes, epochs, without a GPU."""

from typing import NamedTuple

import numpy as np
import pytest
from cases import assert_equals_oracle, assert_same_bits, random_routing, random_tokens, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted_gpu import make_layer
from worlds import check_stats

from flashmoe_numba.build.likeness import like_arguments
from flashmoe_numba.build.variants import Variant
from flashmoe_numba.device.fibers import memory_view
from flashmoe_numba.device.records import read_record, record_words
from flashmoe_numba.seeing.trace import decode
from reference import DISPATCH, Weights


@settings(max_examples=max(3, settings().max_examples // 20))
@given(st.sampled_from(["float32", "float64", "float16", "bfloat16"]), st.integers(1, 3), st.integers(0, 2**20))
def test_the_launch_equals_the_oracle(dtype, num_ranks, seed):
    rng = np.random.default_rng(seed)
    config = tiny_config(
        num_ranks=num_ranks, num_experts=2 * num_ranks, dtype=dtype, gated=bool(seed % 2), capacity=[None, 2][seed % 2]
    )
    weights = Weights.random(config, seed % 7, bias=True)
    with make_layer(config, weights, seed, num_processors=1 + seed % 2, trace=True) as layer:
        for call in range(3):
            counts = rng.integers(0, config.num_tokens + 1, num_ranks)
            x, routing = random_tokens(config, counts, seed + call), {}
            if call == 1:
                routing = dict(zip(("topk_idx", "topk_weights"), random_routing(config, counts, seed), strict=True))
            y = layer(x, **routing)
            assert_equals_oracle(y, x, weights, config, layer.routing, external=bool(routing))
            check_stats(layer, x, layer.routing, epoch=call + 1)
            records = decode(layer.traces)
            assert {record.rank for record in records} == set(range(num_ranks))
            assert sum(record.kind == DISPATCH for record in records) == num_ranks * config.num_experts


def test_calls_give_the_same_bits_for_any_number_of_blocks():
    config = tiny_config(num_ranks=2, num_experts=2, num_topk=1, num_tokens=4)
    weights, x = Weights.random(config), random_tokens(config)
    with make_layer(config, weights, num_processors=1) as one, make_layer(config, weights, seed=9) as most:
        assert most.num_processors == 10 // 2 - 1
        expected = one(x)
        for _ in range(2):
            assert_same_bits(most(x), expected)


def test_a_replayed_launch_counts_its_own_epochs():
    """As a CUDA graph does: the same launch again, with nothing from the host."""
    config = tiny_config(num_ranks=2)
    weights, x = Weights.random(config), random_tokens(config)
    with make_layer(config, weights, num_processors=1) as layer:
        backend = layer._backend
        tokens = [backend.array(part) for part in x]
        y = layer(tokens)
        expected = [part.get() for part in y]
        for part in y:
            part.view(np.uint8)[:] = 0xFF
        arguments = (backend.address(backend._table), backend._table.size)
        for _ in range(2):
            backend.gpu.launch(
                backend._functions[False], 4, 128, arguments, backend.shared_bytes, backend.gpu.caller.ptr
            )
        assert_same_bits([part.get() for part in y], expected)
        assert [stats.epoch for stats in layer.stats] == [3, 3]
        assert_same_bits(layer(x), expected)


def test_blocks_that_cannot_all_be_resident_are_refused():
    config = tiny_config(num_ranks=2)
    with pytest.raises(ValueError, match="at most 4 for 2 ranks, because stand-in for a GPU holds 10 blocks"):
        make_layer(config, Weights.random(config), num_processors=5)


def test_tiles_wider_than_the_kernel_can_are_refused():
    config = tiny_config(tile_n=256)
    with pytest.raises(ValueError, match="tile_n must be at most 128 on a GPU, got 256"):
        make_layer(config, Weights.random(config))


def test_a_record_is_read_as_it_was_written():
    record = like_arguments(Variant(dtype="bfloat16", architecture="sm_90a", tensor_cores=True))
    words = record_words(record, lambda array: array.ctypes.data)
    again = read_record(np.array([7, *words, 7]), 1, record, memory_view)
    flat = [field for group in (record, again) for field in flatten(group)]
    half = len(flat) // 2
    for before, after in zip(flat[:half], flat[half:], strict=True):
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype and before.size == after.size
            assert before.size == 0 or before.ctypes.data == after.ctypes.data
        else:
            assert before == after


def flatten(record):
    for field in record:
        yield from flatten(field) if isinstance(field, tuple) else [field]


class Numbers(NamedTuple):
    whole: int
    single: np.float32
    double: np.float64
    flag: bool


@pytest.mark.parametrize("value", [-1.7, 0.0, -0.0, np.inf, 1e-45])
def test_a_record_has_numbers_as_they_were(value):
    record = Numbers(-5, np.float32(value), np.float64(value), True)
    words = np.array([7, *record_words(record, id)], np.int64)
    assert len(words) == 5, "a number is a word"
    got = read_record(words, 1, record, None)
    assert (got.whole, got.flag) == (-5, True)
    for name in ("single", "double"):
        assert_same_bits(np.array([getattr(got, name)]), np.array([getattr(record, name)]), name)
