"""The layer on one GPU: equal to the oracle, the same bits for any schedule, and good manners towards its users."""

from dataclasses import replace

import numpy as np
import pytest
from cases import DTYPES, assert_equals_oracle, assert_same_bits, random_routing, random_tokens, tiny_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worlds import check_stats, worlds

from flashmoe_numba import FlashMoE
from reference import Weights

SLOW = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)


def to_gpu(parts):
    """CuPy arrays; bfloat16, which it lacks, as bit patterns."""
    import cupy

    return [cupy.asarray(part.view(np.int16) if part.dtype.name == "bfloat16" else part) for part in parts]


def to_host(parts, config):
    import cupy

    return [cupy.asnumpy(part).view(config.numpy_dtype) for part in parts]


def run(layer, x, **routing):
    """One call to its end, from NumPy to NumPy."""
    y = layer(to_gpu(x), **routing)
    layer.synchronize()
    return to_host(y, layer.config)


def tensor_config(dtype, **sizes):
    """Sizes that tensor cores take on Hopper, of every tile height and partly filled tiles."""
    fixed = dict(num_ranks=2, num_tokens=300, hidden=136, ffn=200, num_experts=4, num_topk=2, gated=True)
    return replace(
        tiny_config(), **(fixed | dict(tile_m=128, tile_m_min=16, tile_n=128, token_block=32) | sizes), dtype=dtype
    )


@SLOW
@given(worlds(max_calls=3))
def test_small_layers_equal_the_oracle(world):
    with FlashMoE(world.config, world.weights, backend="cuda", num_processors=world.num_processors) as layer:
        for epoch, (x, routing) in enumerate(world.calls(), start=1):
            y = run(layer, x, **routing)
            assert_equals_oracle(y, x, world.weights, world.config, layer.routing, external=bool(routing))
            check_stats(layer, x, layer.routing, epoch)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("counts", [[1], [17], [40, 300], [100, 0, 7, 300]])
def test_tensor_cores_equal_the_oracle(dtype, gated, num_ranks, counts):
    config = tensor_config(dtype, gated=gated, num_ranks=num_ranks)
    weights = Weights.random(config, seed=1, bias=True)
    x = random_tokens(config, [counts[rank % len(counts)] for rank in range(num_ranks)])
    with FlashMoE(config, weights, backend="cuda") as layer:
        assert_equals_oracle(run(layer, x), x, weights, config, layer.routing)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_blocks_ranks_or_batch(dtype):
    one = tensor_config(dtype, num_ranks=1, num_tokens=256)
    weights = Weights.random(one, seed=2)
    (tokens,) = random_tokens(one, [256])
    with FlashMoE(one, weights, backend="cuda") as layer:
        expected = run(layer, [tokens])[0]
        for rows in (1, 5, 100):
            assert_same_bits(run(layer, [tokens[:rows].copy()])[0], expected[:rows], f"{rows} tokens alone")
    for num_ranks, num_processors in ((1, 1), (2, 3), (4, 7)):
        config = replace(one, num_ranks=num_ranks)
        with FlashMoE(config, weights, backend="cuda", num_processors=num_processors) as layer:
            y = run(layer, np.split(tokens, num_ranks))
            assert_same_bits(np.concatenate(y), expected, f"{num_ranks} ranks, {num_processors} processors")


def test_a_thousand_calls_give_the_same_bits():
    config = tensor_config("float16")
    weights, x = Weights.random(config), random_tokens(config)
    rng = np.random.default_rng(0)
    with FlashMoE(config, weights, backend="cuda") as layer:
        full = run(layer, x)
        for call in range(1000):
            counts = rng.integers(0, config.num_tokens + 1, config.num_ranks)
            y = run(layer, [part[:n] for part, n in zip(x, counts, strict=True)])
            assert_same_bits(
                y, [part[:n] for part, n in zip(full, counts, strict=True)], f"call {call}, counts {counts}"
            )


@settings(parent=SLOW, max_examples=10)
@given(st.integers(0, 2**20))
def test_routing_from_outside(seed):
    config = tensor_config("float16", capacity=50)
    weights, x = Weights.random(config), random_tokens(config, seed=seed)
    idx, factors = random_routing(config, [len(part) for part in x], seed, bias=3.0)
    with FlashMoE(config, weights, backend="cuda") as layer:
        y = run(layer, x, topk_idx=idx, topk_weights=factors)
        assert_equals_oracle(y, x, weights, config, layer.routing, external=True)


def test_a_bad_row_stays_in_its_row():
    config = tensor_config("float16", num_ranks=1)
    weights, (tokens,) = Weights.random(config), random_tokens(config)
    with FlashMoE(config, weights, backend="cuda") as layer:
        good = run(layer, [tokens])[0]
        tokens[7, 3] = np.nan
        bad = run(layer, [tokens])[0]
    others = np.arange(len(tokens)) != 7
    assert_same_bits(bad[others], good[others])
    assert np.isnan(bad[7]).all()


def test_the_callers_stream_and_a_captured_call():
    import cupy

    config = tensor_config("float16", num_ranks=1)
    weights, (tokens,) = Weights.random(config), random_tokens(config)
    with FlashMoE(config, weights, backend="cuda") as layer, cupy.cuda.Stream(non_blocking=True) as stream:
        expected = run(layer, [tokens])[0]
        x = cupy.asarray(tokens)
        stream.begin_capture()
        (y,) = layer([x])
        graph = stream.end_capture()
        for scale in (1, 0, 1):
            x[...] = cupy.asarray(tokens) * scale
            graph.launch(stream)
        layer.synchronize()
        stream.synchronize()
        assert_same_bits(cupy.asnumpy(y), expected)
        assert layer.stats[0].epoch == 4


def test_tensors_of_pytorch_come_back_as_such():
    torch = pytest.importorskip("torch")
    config = tensor_config("bfloat16", num_ranks=1)
    weights, (tokens,) = Weights.random(config), random_tokens(config)
    with FlashMoE(config, weights, backend="cuda") as layer:
        expected = run(layer, [tokens])[0]
        x = torch.from_numpy(tokens.view(np.int16)).cuda().view(torch.bfloat16)
        (y,) = layer([x])
        layer.synchronize()
        assert y.dtype == torch.bfloat16 and y.shape == x.shape
        assert_same_bits(y.view(torch.int16).cpu().numpy().view(config.numpy_dtype), expected)


def test_wrong_tokens_are_refused():
    import cupy

    config = tensor_config("float16", num_ranks=1)
    with FlashMoE(config, Weights.random(config), backend="cuda") as layer:
        with pytest.raises(TypeError, match=r"x\[0\] must be on the GPU, got a NumPy array"):
            layer([np.zeros((1, 136), np.float16)])
        with pytest.raises(TypeError, match=r"x\[0\] must have config's dtype float16, got float32"):
            layer([cupy.zeros((1, 136), np.float32)])
        with pytest.raises(ValueError, match=r"x\[0\] must have shape \[num_tokens, hidden=136\], got \[1, 135\]"):
            layer([cupy.zeros((1, 135), np.float16)])
        with pytest.raises(ValueError, match=r"at most config\.num_tokens=300 tokens, got 301"):
            layer([cupy.zeros((301, 136), np.float16)])
    with pytest.raises(ValueError, match="num_processors must be at most"):
        FlashMoE(config, Weights.random(config), backend="cuda", num_processors=512)
