"""What a call takes and gives: kinds of arrays, streams, CUDA graphs, several layers, and errors that name the fix."""

import threading
import time

import numpy as np
import pytest
from cases import DTYPES, assert_equals_oracle, assert_same_bits, random_routing, random_tokens, tiny_config
from gpu_cases import call, kind_of, make_layer, tensor_config, to_gpu, to_host

from flashmoe_numba import FlashMoE
from reference import MoEConfig, Weights

RELEASE_S, AT_ONCE_S = 10.0, 2.0


# kinds


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_kind_comes_back(kind, dtype):
    config = tiny_config(dtype=dtype)
    weights, x = Weights.random(config), random_tokens(config, [7, 0])
    with make_layer(config, weights) as layer:
        y = call(layer, x, kind)
        assert_equals_oracle(y, x, weights, config, layer.routing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_array_of_all_ranks_comes_back_as_one(kind, dtype):
    config = tiny_config(dtype=dtype)
    weights, x = Weights.random(config), np.stack(random_tokens(config))
    with make_layer(config, weights) as layer:
        y = layer(to_gpu(x, kind))
        layer.synchronize()
        assert kind_of(y) == kind
        assert_equals_oracle(list(to_host(y, config.numpy_dtype)), list(x), weights, config, layer.routing)


def test_arrays_that_are_not_contiguous(kind):
    config = tiny_config(num_ranks=1)
    weights, (wide,) = Weights.random(config), random_tokens(tiny_config(num_ranks=1, hidden=18))
    with make_layer(config, weights) as layer:
        y = layer([to_gpu(wide, kind)[:, ::2]])
        layer.synchronize()
        x = [np.ascontiguousarray(wide[:, ::2])]
        assert_equals_oracle([to_host(y[0], np.float32)], x, weights, config, layer.routing)


def test_the_tokens_are_not_copied(kind):
    """What x holds when the kernel runs counts, so the kernel reads x itself; and x stays as it was."""
    config = tiny_config(num_ranks=1)
    (x,) = random_tokens(config)
    with make_layer(config, Weights.random(config)) as layer:
        tokens = to_gpu(x, kind)
        storage = layer._backend.check_tokens("x", tokens, config).storage
        assert storage.data.ptr == layer._backend.gpu.cupy.asarray(tokens).data.ptr
        layer([tokens])
        layer.synchronize()
        assert_same_bits(to_host(tokens, x.dtype), x)


def test_a_tensor_that_requires_a_gradient():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    config = tiny_config(num_ranks=1)
    weights, x = Weights.random(config), random_tokens(config)
    with make_layer(config, weights) as layer:
        y = layer([to_gpu(x[0], "torch").requires_grad_()])
        layer.synchronize()
        assert isinstance(y[0], torch.Tensor)
        assert_equals_oracle([to_host(y[0], np.float32)], x, weights, config, layer.routing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_routing_from_outside(dtype):
    config = tensor_config(dtype=dtype, num_ranks=2, num_tokens=90)
    weights, counts = Weights.random(config, bias=True), [90, 17]
    x, (idx, factors) = random_tokens(config, counts), random_routing(config, counts, bias=2.0)
    with make_layer(config, weights) as layer:
        y = call(layer, x, topk_idx=idx, topk_weights=factors)
        assert_equals_oracle(y, x, weights, config, layer.routing, external=True)


# streams


def routed_calls(config):
    """Calls that are told apart by their tokens and by their routing."""
    calls = []
    for seed in range(6):
        (x,), (idx, factors) = random_tokens(config, seed=seed), random_routing(config, [config.num_tokens], seed)
        calls.append(([x], dict(topk_idx=idx, topk_weights=factors) if seed % 2 else {}))
    return calls


def test_calls_on_streams_of_their_own(gpu):
    """Calls of one layer on several streams that nothing else orders, some of them with a routing from the host."""
    config = tensor_config()
    calls = routed_calls(config)
    with make_layer(config, Weights.random(config)) as layer:
        expected = [call(layer, x, **routing)[0] for x, routing in calls]
        streams = [gpu.cupy.cuda.Stream(non_blocking=True) for _ in calls]
        tokens = [to_gpu(x[0]) for x, _ in calls]
        gpu.synchronize()
        got = []
        for stream, x, (_, routing) in zip(streams, tokens, calls, strict=True):
            with stream:
                got += layer([x], **routing)
        layer.synchronize()
        for turn, (part, wanted) in enumerate(zip(got, expected, strict=True)):
            assert_same_bits(to_host(part, config.numpy_dtype), wanted, f"call {turn}")


def test_calls_on_torchs_streams(gpu):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    config = tensor_config()
    calls = routed_calls(config)
    with make_layer(config, Weights.random(config)) as layer:
        expected = [call(layer, x, **routing)[0] for x, routing in calls]
        tokens = [to_gpu(x[0], "torch") for x, _ in calls]
        torch.cuda.synchronize()
        stream, got = torch.cuda.Stream(), []
        with torch.cuda.stream(stream):
            for x, (_, routing) in zip(tokens, calls, strict=True):
                got += layer([x + 0], **routing)  # its input is made on the stream, just before
        stream.synchronize()
        for turn, (part, wanted) in enumerate(zip(got, expected, strict=True)):
            assert_same_bits(to_host(part, config.numpy_dtype), wanted, f"call {turn}")


def test_a_call_returns_before_it_is_done(gpu, kind):
    """The stream waits for this thread, so a call that waits for its stream would never return."""
    config = tensor_config()
    weights, (x,) = Weights.random(config), random_tokens(config)
    with make_layer(config, weights) as layer:
        tokens = [to_gpu(x, kind)]
        expected = layer(tokens)
        layer.synchronize()
        release = threading.Event()
        timer = threading.Timer(RELEASE_S, release.set)
        timer.start()
        gpu.cupy.cuda.Stream.null.launch_host_func(lambda _: release.wait(), None)
        start = time.monotonic()
        results = [layer(tokens) for _ in range(3)]
        waited = time.monotonic() - start
        release.set()
        timer.cancel()
        layer.synchronize()
        assert waited < AT_ONCE_S, f"three calls took {waited:.1f} s, although their stream was not ready"
        for part in results:
            assert_same_bits(to_host(part[0], np.float16), to_host(expected[0], np.float16))


# CUDA graphs


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_captured_call_is_replayed(gpu, num_ranks):
    config = tensor_config(num_ranks=num_ranks, num_tokens=150)
    weights, first, second = Weights.random(config), random_tokens(config), random_tokens(config, seed=1)
    with make_layer(config, weights) as layer:
        expected = [call(layer, x) for x in (first, second)]
        stream = gpu.cupy.cuda.Stream(non_blocking=True)
        tokens = [to_gpu(part) for part in first]
        gpu.synchronize()
        with stream:
            layer(tokens)  # the first call of this kind, before it is captured
            layer.synchronize()
            stream.begin_capture()
            y = layer(tokens)
            graph = stream.end_capture()
            calls = 3  # so far
            for turn in range(20):
                for part, new in zip(tokens, (first, second)[turn % 2], strict=True):
                    part.set(new)
                graph.launch(stream)
                stream.synchronize()
                got = [to_host(part, config.numpy_dtype) for part in y]
                assert_same_bits(got, expected[turn % 2], f"replay {turn}")
            assert [stats.epoch for stats in layer.stats] == [calls + 20] * num_ranks
        assert_same_bits(call(layer, second), expected[1], "an ordinary call after the replays")


def test_a_captured_routing_from_the_host_is_replayed(gpu):
    """Its values are read again by every replay, long after the call that was captured."""
    config = tensor_config()
    (x,), (idx, factors) = random_tokens(config), random_routing(config, [config.num_tokens], 1)
    routing = dict(topk_idx=idx, topk_weights=factors)
    with make_layer(config, Weights.random(config)) as layer:
        expected, other = call(layer, [x], **routing), call(layer, [x])
        stream, tokens = gpu.cupy.cuda.Stream(non_blocking=True), to_gpu(x)
        gpu.synchronize()
        with stream:
            stream.begin_capture()
            (y,) = layer([tokens], **routing)
            graph = stream.end_capture()
            for turn in range(5):
                assert_same_bits(call(layer, [x]), other, f"between replays, {turn}")
                graph.launch(stream)
                stream.synchronize()
                assert_same_bits([to_host(y, config.numpy_dtype)], expected, f"replay {turn}")


def test_torchs_graphs():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    config = tensor_config()
    weights, (x,) = Weights.random(config), random_tokens(config)
    with make_layer(config, weights) as layer:
        expected = call(layer, [x])
        tokens, graph = to_gpu(x, "torch"), torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            layer([tokens])
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            (y,) = layer([tokens])
        for _ in range(5):
            y.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert_same_bits([to_host(y, config.numpy_dtype)], expected)


# several layers


def test_two_layers_at_once(gpu):
    """Each on its stream, of other shapes and dtypes, so of other kernels and of other needs of shared memory."""
    configs = [tensor_config(), tensor_config(hidden=136, ffn=200, gated=False), tiny_config(dtype="float64")]
    configs.append(tiny_config(dtype="float64", hidden=9000, num_tokens=3))
    weights = [Weights.random(config) for config in configs]
    x = [random_tokens(config) for config in configs]
    layers = [make_layer(config, own) for config, own in zip(configs, weights, strict=True)]
    streams = [gpu.cupy.cuda.Stream(non_blocking=True) for _ in layers]
    tokens = [[to_gpu(part) for part in parts] for parts in x]
    gpu.synchronize()
    results = []
    for _ in range(20):
        for layer, stream, parts in zip(layers, streams, tokens, strict=True):
            with stream:
                results.append(layer(parts))
    for layer in layers:
        layer.synchronize()
    for i, (layer, own) in enumerate(zip(layers, weights, strict=True)):
        runs = [[to_host(part, layer.config.numpy_dtype) for part in y] for y in results[i :: len(layers)]]
        for y in runs[1:]:
            assert_same_bits(y, runs[0], f"{layer.config}")
        assert_equals_oracle(runs[0], x[i], own, layer.config, layer.routing)
        layer.close()


def test_layers_give_their_memory_back(gpu):
    config = tensor_config(num_tokens=256, hidden=1024, ffn=1024)
    weights, pool = Weights.random(config), gpu.cupy.get_default_memory_pool()
    used = []
    for _ in range(4):
        with make_layer(config, weights) as layer:
            call(layer, random_tokens(config))
        del layer
        used.append(pool.used_bytes())
    assert used[-1] <= used[0], f"bytes in use after each layer: {used}"


# bad input


@pytest.fixture
def layer(gpu):
    config = tiny_config(num_ranks=1)
    with make_layer(config, Weights.random(config)) as layer:
        yield layer
        x = random_tokens(config)
        assert_equals_oracle(call(layer, x), x, Weights.random(config), config, layer.routing)  # it still works


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: np.asarray(x), TypeError, r"x\[0\] must be on the GPU, got a NumPy array: put it there"),
        (lambda x: x.tolist(), TypeError, r"x\[0\] must be an array on the GPU, got list"),
        (lambda x: to_gpu(x.astype(np.float64)), TypeError, r"config's dtype float32, got float64"),
        (lambda x: to_gpu(x[:, 1:]), ValueError, r"shape \[num_tokens, hidden=9\], got \[7, 8\]"),
        (lambda x: to_gpu(x[0]), ValueError, r"shape \[num_tokens, hidden=9\], got \[9\]"),
        (lambda x: to_gpu(np.repeat(x, 2, axis=0)), ValueError, r"at most config.num_tokens=7 tokens, got 14"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(layer, change, error, message):
    (x,) = random_tokens(layer.config)
    with pytest.raises(error, match=message):
        layer([change(x)])


def test_a_tensor_on_the_cpu_is_refused(layer):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    with pytest.raises(TypeError, match=r"x\[0\] must be on the GPU, got a tensor on cpu: put it there with .cuda\(\)"):
        layer([torch.zeros(7, 9)])


def test_an_array_on_another_gpu_is_refused(layer, gpu):
    if gpu.count() < 2:
        pytest.skip("needs two GPUs")
    with gpu.cupy.cuda.Device(1 - gpu.device):
        elsewhere = gpu.cupy.zeros((7, 9), np.float32)
    with pytest.raises(ValueError, match=rf"must be on GPU {gpu.device}, where this layer is; it is on GPU"):
        layer([elsewhere])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"device": 99}, r"device must be in \[0, \d+\], the GPUs of this machine; got 99"),
        ({"num_processors": 500}, r"num_processors must be at most \d+ for 4 ranks, because .* holds \d+ blocks"),
    ],
)
def test_what_the_gpu_does_not_have_is_refused(gpu, how, message):
    config = tiny_config(num_ranks=4)
    with pytest.raises(ValueError, match=message):
        FlashMoE(config, Weights.random(config), backend="cuda", **how)


def test_tiles_that_are_too_wide_are_refused(gpu):
    config = tiny_config(tile_n=256)
    with pytest.raises(ValueError, match="tile_n must be at most 128 on a GPU, got 256"):
        make_layer(config, Weights.random(config))


def test_rows_that_are_too_long_are_refused(gpu):
    config = tiny_config(hidden=100_000, ffn=1, num_experts=2, num_topk=1)
    with pytest.raises(ValueError, match="hidden=100000 needs 400000 bytes of shared memory"):
        make_layer(config, Weights.random(config))


def test_too_little_memory_is_said(gpu):
    sizes = dict(num_ranks=1, num_tokens=1 << 24, hidden=4096, ffn=8, num_experts=64, num_topk=1)
    config = MoEConfig(**sizes, dtype="float16")
    with pytest.raises(MemoryError, match=r"has .* GiB free, and [\d.]+ GiB more are needed"):
        make_layer(config, Weights.random(config))
    small = tiny_config()
    x = random_tokens(small)
    with make_layer(small, Weights.random(small)) as layer:  # nothing is left behind that breaks the next one
        assert_equals_oracle(call(layer, x), x, Weights.random(small), small, layer.routing)
