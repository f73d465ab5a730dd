"""Weights apart from a layer: what `pack` returns computes as a layer made with them, `load` repacks where it is."""

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, random_routing, random_tokens, tiny_config, usable_arithmetics

from flashmoe_numba import FlashMoE, FlashMoEError
from flashmoe_numba.tile_gemm.arithmetic import PAIRED_DTYPE
from flashmoe_numba.tile_gemm.packing import fill_compiled
from flashmoe_numba.tile_gemm.panels import fill_panels, num_tiles, panels_per_tile
from reference import Weights

MATRICES = ("gate_proj", "up_proj", "down_proj")


def results(config, weights, x):
    with FlashMoE(config, weights) as layer:
        return layer(x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_computes_with_others_weights(dtype):
    config = tiny_config(dtype=dtype)
    first, second = (Weights.random(config, seed, bias=True) for seed in (0, 1))
    x = random_tokens(config)
    expected = [results(config, weights, x) for weights in (first, second)]
    assert not np.array_equal(expected[0][0], expected[1][0])
    with FlashMoE(config, first) as layer:
        packed = layer.pack(second)
        for _ in range(2):
            assert_same_bits(layer(x), expected[0])
            assert_same_bits(layer(x, weights=packed), expected[1])
        layer.load(second)
        layer.load(first, packed)
        assert_same_bits(layer(x), expected[1])
        assert_same_bits(layer(x, weights=packed), expected[0])


def test_biases_go_when_loaded_weights_have_none():
    config = tiny_config()
    x, plain = random_tokens(config), Weights.random(config, 1)
    with FlashMoE(config, Weights.random(config, 0, bias=True)) as layer:
        layer.load(plain)
        assert_same_bits(layer(x), results(config, plain, x))


def test_a_routing_from_outside_goes_to_the_other_weights():
    config = tiny_config()
    first, second = (Weights.random(config, seed) for seed in (0, 1))
    x, (idx, factors) = random_tokens(config), random_routing(config, [config.num_tokens] * 2)
    routing = dict(topk_idx=idx, topk_weights=factors)
    with FlashMoE(config, second) as other, FlashMoE(config, first) as layer:
        assert_same_bits(layer(x, weights=layer.pack(second), **routing), other(x, **routing))


PACKED = [("fibers", dtype, {}) for dtype in DTYPES]
PACKED += [("cpu", dtype, {}) for dtype in DTYPES if dtype != PAIRED_DTYPE]
PACKED += [("cpu", PAIRED_DTYPE, {"arithmetic": name}) for name in usable_arithmetics()]


@pytest.mark.parametrize(("backend", "dtype", "setting"), PACKED)
def test_unpacks_what_was_packed(backend, dtype, setting):
    config = tiny_config(dtype=dtype, hidden=19, ffn=11)
    weights = Weights.random(config, 2)
    fused = np.zeros((config.num_experts, 2 * config.ffn, config.hidden), config.numpy_dtype)
    down = np.zeros((config.num_experts, config.ffn, config.hidden), config.numpy_dtype).transpose(0, 2, 1)
    out = Weights(router=weights.router, gate_proj=fused[:, ::2], up_proj=fused[:, 1::2], down_proj=down)
    with FlashMoE(config, Weights.random(config, 3), backend=backend, **setting) as layer:
        layer.pack(weights).unpack(out)
    for name in MATRICES:
        assert_same_bits(np.ascontiguousarray(getattr(out, name)), getattr(weights, name), name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint16, np.int16])
@pytest.mark.parametrize(("columns", "depth", "tile_n"), [(1, 1, 1), (40, 33, 16), (37, 100, 24), (65, 16, 128)])
def test_compiled_packing_is_numpys(dtype, columns, depth, tile_n):
    matrix = np.random.default_rng(0).integers(1, 1 << 15, (columns, depth)).astype(dtype)
    tile_n, width = min(tile_n, columns), 16
    shape = num_tiles(columns, tile_n), 3, panels_per_tile(columns, tile_n, width), depth, width
    expected, got = (np.full(shape, 7, dtype) for _ in range(2))
    fill_panels(matrix, expected[:, 1], tile_n)
    frozen = matrix.copy()
    frozen.setflags(write=False)
    for given in (matrix, np.asfortranarray(matrix), frozen):
        got[:] = 7
        fill_compiled(given, got[:, 1], tile_n)
        np.testing.assert_array_equal(got, expected)


def test_refuses_what_another_layer_packed():
    config = tiny_config()
    weights, x = Weights.random(config), random_tokens(config)
    with FlashMoE(config, weights) as other, FlashMoE(config, weights) as layer:
        of_another = r"must be what pack\(\) of this layer returned, got that of another layer$"
        with pytest.raises(ValueError, match=f"^weights {of_another}"):
            layer(x, weights=other.pack(weights))
        with pytest.raises(ValueError, match=f"^into {of_another}"):
            layer.load(weights, other.pack(weights))
        with pytest.raises(ValueError, match=r"of this layer returned, got Weights: layer\.pack\(weights\)\?$"):
            layer(x, weights=weights)
        with pytest.raises(TypeError, match="weights must be Weights, got ndarray"):
            layer.pack(weights.router)
        wide = tiny_config(hidden=10)
        with pytest.raises(ValueError, match="router must have shape"):
            layer.load(Weights.random(wide))
        layer(x)


def test_a_closed_layer_packs_nothing():
    config = tiny_config()
    weights = Weights.random(config)
    layer = FlashMoE(config, weights)
    packed = layer.pack(weights)
    layer.close()
    for use in (lambda: layer.pack(weights), lambda: layer.load(weights), lambda: layer(random_tokens(config))):
        with pytest.raises(FlashMoEError, match="closed"):
            use()
    with pytest.raises(FlashMoEError, match="closed"):
        layer(random_tokens(config), weights=packed)
