"""The layer on a GPU equals the float64 oracle: any small layer by lanes, and tensor cores on shapes made for them."""

from dataclasses import replace

import numpy as np
import pytest
from cases import DTYPES, assert_equals_oracle, random_routing, random_tokens, tiny_config
from gpu_cases import TILE_M, TILE_M_MIN, call, make_layer, run_world, tensor_config
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import LayerCalls, worlds

from reference import ACTIVATIONS, Weights, max_rel_error, moe_layer, tolerance
from reference.runs import packet_tile_height

ROWS = (1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300)


@given(worlds(dtypes=DTYPES))
def test_any_small_layer_equals_the_oracle(world):
    run_world(world)


@st.composite
def tensor_worlds(draw):
    """Layers for tensor cores: rows of 16 bytes and more, tiles of 128 columns, packets of 0 to 300 rows."""
    num_ranks = draw(st.sampled_from([1, 2, 4]))
    config = tensor_config(
        num_ranks=num_ranks,
        num_tokens=draw(st.sampled_from([1, 40, 140, 300])),
        hidden=draw(st.sampled_from([8, 64, 72, 136, 200, 264])),
        ffn=draw(st.sampled_from([8, 64, 72, 128, 136, 200, 320])),
        num_experts=num_ranks * draw(st.sampled_from([1, 2])) * 2,
        num_topk=draw(st.sampled_from([1, 2])),
        gated=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        dtype=draw(st.sampled_from(["float16", "bfloat16"])),
        capacity=draw(st.sampled_from([None, None, 1])),
        tile_m_min=draw(st.sampled_from([TILE_M_MIN, TILE_M])),
        token_block=draw(st.sampled_from([7, 32])),
    )
    weights = Weights.random(config, seed=draw(st.integers(0, 99)), bias=draw(st.booleans()))
    counts = draw(st.lists(st.tuples(*[st.integers(0, config.num_tokens)] * num_ranks), min_size=1, max_size=2))
    biases = [draw(st.sampled_from([None, 0.0, 50.0])) for _ in counts]
    x = [random_tokens(config, count, seed) for seed, count in enumerate(counts)]
    routings = [
        None if bias is None else random_routing(config, count, seed, bias)
        for seed, (count, bias) in enumerate(zip(counts, biases, strict=True))
    ]
    return LayerCalls(config, weights, draw(st.sampled_from([1, 3, 20])), x, routings)


@given(tensor_worlds())
def test_tensor_cores_equal_the_oracle(hopper_checked, world):
    run_world(world)


@pytest.fixture(scope="module")
def hopper_checked(gpu):
    """As `hopper`, for a whole module: Hypothesis runs many examples in one test."""
    if gpu.capability != (9, 0):
        pytest.skip(f"for compute capability 9.0, this is {gpu.name}")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_packets_of_every_height(hopper, dtype, gated):
    """All tokens to one expert: the number of rows is the number of tokens."""
    config = tensor_config(dtype=dtype, gated=gated, num_topk=1)
    weights = Weights.random(config, seed=3, bias=True)
    with make_layer(config, weights) as layer:
        assert layer._backend.variant.tensor_cores
        for rows in ROWS:
            x = random_tokens(config, [rows], seed=rows)
            routing = dict(topk_idx=[np.full((rows, 1), 5)], topk_weights=[np.ones((rows, 1))])
            y = call(layer, x, **routing)
            assert_equals_oracle(y, x, weights, config, layer.routing, external=True)
            height = packet_tile_height(rows, config)
            assert layer.stats[0].padded_rows == -(-rows // height) * height, f"{rows} rows"


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(("hidden", "ffn"), [(72, 136), (136, 72), (200, 200), (264, 520), (8, 8)])
def test_odd_shapes_on_virtual_ranks(hopper, hidden, ffn, num_ranks):
    config = tensor_config(num_ranks=num_ranks, num_tokens=70, hidden=hidden, ffn=ffn)
    weights, counts = Weights.random(config, bias=True), [70, 0, 33, 1][:num_ranks]
    with make_layer(config, weights) as layer:
        assert layer._backend.variant.tensor_cores
        x = random_tokens(config, counts)
        assert_equals_oracle(call(layer, x), x, weights, config, layer.routing)


@pytest.mark.parametrize("gated", [False, True])
def test_float32_as_tf32(hopper, gated):
    """TF32 keeps float16's ten bits of a mantissa, so float16's tolerance is the measure."""
    config = tensor_config(dtype="float32", gated=gated)
    weights, x = Weights.random(config, bias=True), random_tokens(config)
    with make_layer(config, weights, tf32=True) as layer:
        assert layer._backend.variant.tensor_cores
        y = call(layer, x)
        idx, factors = zip(*[(r.topk_idx, r.topk_weights) for r in layer.routing], strict=True)
    error = max_rel_error(y, moe_layer(x, weights, config, list(idx), list(factors)))
    assert error <= tolerance(replace(config, dtype="float16"))
    assert error > tolerance(config) / 100, "it cannot be that close, if it was TF32"


def test_float32_is_not_rounded_unless_asked(hopper):
    config = tensor_config(dtype="float32")
    with make_layer(config, Weights.random(config)) as layer:
        assert not layer._backend.variant.tensor_cores


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_that_is_not_finite_spoils_its_own_row(dtype):
    config = tensor_config(dtype=dtype, num_ranks=2, num_tokens=40, num_topk=3)
    weights, x = Weights.random(config, bias=True), random_tokens(config)
    with make_layer(config, weights) as layer:
        clean = call(layer, x)
        for value in ("nan", "inf"):
            bad = [part.copy() for part in x]
            bad[1][33, 7] = float(value)
            y = call(layer, bad)
            assert not np.isfinite(y[1][33].astype(np.float64)).any()
            keep = np.arange(40) != 33
            np.testing.assert_array_equal(y[0].view(np.uint8), clean[0].view(np.uint8))
            np.testing.assert_array_equal(y[1][keep].view(np.uint8), clean[1][keep].view(np.uint8))
        again = call(layer, x)
        for part, expected in zip(again, clean, strict=True):
            np.testing.assert_array_equal(part.view(np.uint8), expected.view(np.uint8))


def test_the_trace_tells_of_every_task(gpu):
    from flashmoe_numba.seeing.trace import decode
    from reference import KIND_NAMES, make_packets, task_graph

    config = tiny_config()
    weights, x = Weights.random(config), random_tokens(config)
    with make_layer(config, weights, trace=True) as layer:
        for _ in range(2):
            call(layer, x)
        packets = [make_packets(routing.topk_idx, config) for routing in layer.routing]
        records = decode(layer.traces)
    for record in records:
        assert 0 < record.start_ns <= record.end_ns
    tasks = {(t.kind, t.rank, t.peer, t.expert, t.m, t.n) for t in task_graph(packets, config)}
    seen = {(r.kind, r.rank, r.peer, r.expert, r.m, r.n) for r in records if r.kind < len(KIND_NAMES)}
    assert seen == tasks


few = settings(max_examples=max(5, settings().max_examples // 6))


@few
@given(worlds(max_calls=8, dtypes=("float32",), capacity=None))
def test_many_epochs_on_one_layer(world):
    run_world(world)
