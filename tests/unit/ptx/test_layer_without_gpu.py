"""The layer by its ordinary call, backend="cuda", on the stand-in: its kernel interpreted on fibers, no compiler."""

import sys

import numpy as np
import pytest
from cases import (
    DTYPES,
    assert_equals_oracle,
    assert_same_bits,
    random_routing,
    random_tokens,
    record_words,
    tiny_config,
)
from stand_ins import ENTRY, TEXT, InterpretedGrid, nothing, without_gpu

from flashmoe_numba import FlashMoE
from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.gpu import libcuda
from flashmoe_numba.kernel import control as s
from flashmoe_numba.kernel.grid import HEADER_WORDS
from flashmoe_numba.ptx import tensor_map
from flashmoe_numba.ptx.tensor_map import decode
from flashmoe_numba.tile_gemm.hopper import ROWS
from reference import Weights

CONFIG = tiny_config()


@pytest.fixture
def grid():
    """A launch: interpreted, or what a test puts in its place."""
    return Grid(InterpretedGrid(CONFIG, 5))


class Grid:
    def __init__(self, run):
        self.run = run

    def __call__(self, *launch):
        self.run(*launch)


@pytest.fixture
def cupy(monkeypatch, grid):
    with without_gpu(monkeypatch, grid) as cupy:
        yield cupy


def on_host(arrays, config=CONFIG):
    return [array.get().view(config.numpy_dtype) for array in arrays]


def make_layer(config=CONFIG, **how):
    weights = Weights.random(config, bias=True)
    return weights, FlashMoE(config, weights, backend="cuda", **how)


@pytest.mark.parametrize(("dtype", "num_ranks"), list(zip(DTYPES, (1, 2, 3, 2), strict=True)))
def test_calls_with_changing_tokens_equal_the_oracle(monkeypatch, dtype, num_ranks):
    config = tiny_config(dtype=dtype, num_ranks=num_ranks, num_experts=2 * num_ranks)
    with without_gpu(monkeypatch, InterpretedGrid(config), multiprocessors=3) as cupy:
        weights, layer = make_layer(config)
        with layer:
            for call in range(3):
                x = random_tokens(config, [(3 * call + rank) % 8 for rank in range(num_ranks)], call)
                y = layer([cupy.asarray(part) for part in x])
                assert_equals_oracle(on_host(y, config), x, weights, config, layer.routing)
            assert [stats.epoch for stats in layer.stats] == [3] * num_ranks


def test_one_array_of_all_ranks_comes_back_as_one(cupy):
    weights, layer = make_layer()
    x = np.stack(random_tokens(CONFIG))
    with layer:
        y = layer(cupy.asarray(x))
        assert isinstance(y, cupy.ndarray) and y.shape == x.shape
        assert_equals_oracle(list(y.get()), list(x), weights, CONFIG, layer.routing)


def test_a_routing_from_outside(cupy):
    weights, layer = make_layer()
    counts = [7, 2]
    x, (idx, factors) = random_tokens(CONFIG, counts), random_routing(CONFIG, counts, bias=2.0)
    with layer:
        for _ in range(2):
            y = layer([cupy.asarray(part) for part in x], topk_idx=idx, topk_weights=factors)
            assert_equals_oracle(on_host(y), x, weights, CONFIG, layer.routing, external=True)


def test_tokens_that_are_not_contiguous(cupy):
    weights, layer = make_layer()
    x = random_tokens(tiny_config(hidden=2 * CONFIG.hidden))
    with layer:
        y = layer([cupy.asarray(part)[:, ::2] for part in x])
        assert_equals_oracle(on_host(y), [part[:, ::2] for part in x], weights, CONFIG, layer.routing)


def test_the_second_gpu(cupy):
    weights, layer = make_layer(device=1)
    x = random_tokens(CONFIG)
    with layer:
        with pytest.raises(ValueError, match="must be on GPU 1, where this layer is; it is on GPU 0"):
            layer([cupy.asarray(part) for part in x])
        with cupy.cuda.Device(1):
            tokens = [cupy.asarray(part) for part in x]
        y = layer(tokens)
        assert {part.device.id for part in y} == {1}
        with cupy.cuda.Device(1):
            assert_equals_oracle(on_host(y), x, weights, CONFIG, layer.routing)


# CUDA graphs


@pytest.mark.parametrize(
    ("step", "as_one", "routed"), [(1, False, False), (1, False, True), (1, True, False), (2, False, False)]
)
def test_a_captured_call_is_replayed_with_other_tokens(cupy, step, as_one, routed):
    """Copied tokens (step 2), and results of ranks that are put together, are no longer held by anybody outside."""
    weights, layer = make_layer()
    stream, counts = cupy.cuda.Stream(non_blocking=True), [CONFIG.num_tokens] * 2
    how = dict(zip(("topk_idx", "topk_weights"), random_routing(CONFIG, counts), strict=True)) if routed else {}
    with layer, stream:
        tokens = cupy.empty((2, CONFIG.num_tokens, step * CONFIG.hidden), np.float32)[:, :, ::step]
        stream.begin_capture()
        y = layer(tokens if as_one else [tokens[0], tokens[1]], **how)
        graph = stream.end_capture()
        for seed in range(2):
            x = random_tokens(CONFIG, seed=seed)
            tokens[...] = np.stack(x)
            graph.launch(stream)
            layer.synchronize()
            assert_equals_oracle(on_host(y), x, weights, CONFIG, layer.routing, external=routed)
            assert [stats.epoch for stats in layer.stats] == [seed + 1] * 2
        assert_same_bits(on_host(layer([cupy.asarray(part) for part in x], **how)), on_host(y))


def test_a_captured_call_does_nothing_yet(cupy, grid):
    _, layer = make_layer()
    with layer:
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            tokens = [cupy.asarray(part) for part in random_tokens(CONFIG)]
            stream.begin_capture()
            layer(tokens)
            assert grid.run.launches == 0
            graph = stream.end_capture()
        assert grid.run.launches == 0
        graph.launch(stream)
        assert grid.run.launches == 1


# ends


def give_up(layer):
    """What the kernel leaves where rank 1 gave up."""
    control = layer._ranks[1].control
    for word in (*record_words("role", "flag"), s.RECORD):
        control[word] = {s.RECORD: s.COMPLETE}.get(word, s.SUBSCRIBER)
    for rank in layer._ranks:
        rank.control[s.ABORT] = 2


def test_a_replay_that_was_given_up_is_told_by_a_later_call(cupy, grid):
    _, layer = make_layer()
    stream = cupy.cuda.Stream(non_blocking=True)
    with layer:
        tokens = [cupy.asarray(part) for part in random_tokens(CONFIG)]
        with stream:
            stream.begin_capture()
            layer(tokens)
            graph = stream.end_capture()
            grid.run = lambda *_: give_up(layer)
            graph.launch()
        with pytest.raises(FlashMoEError, match="rank 1, block"):
            layer(tokens)


def test_a_rank_that_leaves_stops_all(cupy):
    _, layer = make_layer()
    with layer:
        layer([cupy.asarray(part) for part in random_tokens(CONFIG)])
        layer._backend.leave(*layer._ranks[1].leaving(1))
        assert [int(rank.control.get()[s.ABORT]) for rank in layer._ranks] == [2, 2]
        with pytest.raises(FlashMoEError, match="rank 1 left in epoch 1"):
            layer.synchronize()


class Fault(Exception):
    pass


def test_a_launch_that_fails_breaks_the_gpu(cupy, grid):
    def fail(*_):
        raise Fault("a read of nothing")

    _, layer = make_layer()
    tokens = [cupy.asarray(part) for part in random_tokens(CONFIG)]
    grid.run = fail
    with layer:
        with pytest.raises(Fault):
            layer(tokens)
        with pytest.raises(FlashMoEError, match="its last call was interrupted by Fault"):
            layer(tokens)
        with pytest.raises(RuntimeError, match=r"cudaErrorLaunchFailure: .*Fault: a read of nothing"):
            layer._backend.synchronize()
    with pytest.raises(RuntimeError, match="cudaErrorLaunchFailure"):
        cupy.zeros(3, np.int64)


def test_out_of_memory_says_how_much_there_is(monkeypatch):
    with without_gpu(monkeypatch, InterpretedGrid(CONFIG), memory_bytes=1 << 12) as cupy:
        text = r"GPU 0 \(stand-in for a GPU\) has 0.00 of 0.00 GiB free, and 0.00 GiB more are needed"
        with pytest.raises(MemoryError, match=text):
            make_layer()
        assert cupy.cuda.runtime.memGetInfo() == (1 << 12, 1 << 12), "what was taken before is given back"


def test_more_blocks_than_the_gpu_holds_are_refused(cupy):
    with pytest.raises(ValueError, match="because stand-in for a GPU holds 4 blocks of this kernel at a time; got 2"):
        make_layer(num_processors=2)


def test_a_launch_is_given_the_text_the_entry_and_the_table(cupy, grid):
    launches = []
    grid.run = lambda *launch: launches.append(launch)
    _, layer = make_layer()
    with layer:
        layer([cupy.asarray(part) for part in random_tokens(CONFIG)])
        table = layer._backend._table.get()
        [(text, entry, blocks, threads, arguments, shared)] = launches
        assert (text, entry, blocks, threads) == (TEXT, ENTRY, 4, 128)
        assert arguments == (layer._backend._table.data.ptr, table.size) and shared == layer._backend.shared_bytes
        assert table[:2].tolist() == [2, (table.size - HEADER_WORDS) // 2]


@pytest.mark.parametrize(("dtype", "gated", "kind"), [("float16", True, 6), ("bfloat16", False, 9)])
def test_the_maps_of_a_kernel_with_tensor_cores_show_its_arrays(monkeypatch, dtype, gated, kind):
    """As the machine reads them: weights of all experts by half tiles, and rows by tiles of every height."""
    config = tiny_config(dtype=dtype, gated=gated, hidden=72, ffn=40, tile_n=128, tile_m=64, tile_m_min=8)
    with without_gpu(monkeypatch, nothing, capability=(9, 0)):
        _, layer = make_layer(config, num_processors=1)
        with layer:
            rank, item = layer._ranks[0], 2
            for packed, rows in ((rank.experts.up, rank.segments.dispatch), (rank.experts.down, rank.received.hidden)):
                first, second, *of_rows = map(decode, packed.maps.get().reshape(-1, tensor_map.NUM_WORDS))
                depth, arrays = packed.depth, (packed.first, packed.second if packed.parts == 2 else packed.first)
                for found, array in zip((first, second), arrays, strict=True):
                    assert (found.data_type, found.address) == (kind, array.data.ptr)
                    assert found.sizes == [depth, packed.columns, config.num_experts_per_rank]
                    assert found.strides == [depth * item, depth * packed.columns * item]
                    assert (found.box, found.swizzle) == ([64, 64, 1], tensor_map.SWIZZLE_128B)
                assert [found.box for found in of_rows] == [[64, height] for height in (*ROWS, 1)]
                assert {(found.address, *found.sizes) for found in of_rows} == {
                    (rows.data.ptr, depth, rows.size // depth)
                }


def test_everything_is_as_it_was_afterwards(monkeypatch):
    before, cupy = libcuda.load, sys.modules.get("cupy")
    with without_gpu(monkeypatch, InterpretedGrid(CONFIG)) as stand_in:
        import cupy as imported

        assert imported is stand_in and libcuda.load() is stand_in.library
    assert libcuda.load is before and sys.modules.get("cupy") is cupy
