"""Every wrong argument is a TypeError or ValueError that names the argument, its value and the rule."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, random_routing, random_tokens, tiny_config

import flashmoe_numba
from flashmoe_numba import FlashMoE
from flashmoe_numba.backends.fibers import FiberBackend
from flashmoe_numba.errors import FlashMoEError
from flashmoe_numba.heap.threads import ThreadHeap
from reference import MoEConfig, Weights

CONFIG = tiny_config(num_ranks=2, num_tokens=5, hidden=6, ffn=4)
WEIGHTS = Weights.random(CONFIG, bias=True)
X = random_tokens(CONFIG)
IDX, FACTORS = random_routing(CONFIG, [5, 5])


def named(*parts):
    """All parts, in any order."""
    return re.compile("".join(f"(?=.*{re.escape(str(part))})" for part in parts), re.DOTALL)


def raises(kind, *parts):
    return pytest.raises(kind, match=named(*parts))


HUGE = replace(CONFIG, num_tokens=2**24)
SIZES = dict(num_ranks=2, num_tokens=5, hidden=6, ffn=4, num_experts=4, num_topk=2)


@pytest.mark.parametrize(
    ("fields", "kind", "parts"),
    [
        ({"num_experts": 3}, ValueError, ["num_experts", "multiple of num_ranks=2", "got 3"]),
        ({"num_topk": 5}, ValueError, ["num_topk", "num_experts=4", "got 5"]),
        ({"num_topk": 0}, ValueError, ["num_topk", "got 0"]),
        ({"capacity": 0}, ValueError, ["capacity", "got 0"]),
        ({"capacity": 6}, ValueError, ["capacity", "num_tokens=5", "got 6"]),
        ({"activation": "swish"}, ValueError, ["activation", "silu", "'swish'"]),
        ({"dtype": "int8"}, ValueError, ["dtype", "bfloat16", "'int8'"]),
        ({"num_tokens": -1}, ValueError, ["num_tokens", "got -1"]),
        ({"hidden": 0}, ValueError, ["hidden", "got 0"]),
        ({"ffn": 2.0}, TypeError, ["ffn", "integer", "2.0"]),
        ({"num_ranks": True}, TypeError, ["num_ranks", "integer", "True"]),
        ({"gated": 1}, TypeError, ["gated", "True or False", "1"]),
        ({"tile_m": 48, "tile_m_min": 16}, ValueError, ["tile_m", "tile_m_min=16", "power of two", "48"]),
    ],
    ids=str,
)
def test_config(fields, kind, parts):
    with raises(kind, *parts):
        MoEConfig(**(SIZES | fields))


def changed(**arrays):
    return replace(WEIGHTS, **arrays)


@pytest.mark.parametrize(
    ("arguments", "kind", "parts"),
    [
        ({"config": SIZES}, TypeError, ["config", "MoEConfig", "dict"]),
        ({"weights": {}}, TypeError, ["weights", "Weights", "dict"]),
        ({"weights": changed(router=WEIGHTS.router[:, :5])}, ValueError, ["router", "[4, 6]", "[4, 5]"]),
        ({"weights": changed(router=WEIGHTS.router.astype(np.float64))}, TypeError, ["router", "float32", "float64"]),
        ({"weights": changed(up_proj=WEIGHTS.up_proj[:, :3])}, ValueError, ["up_proj", "4, 6]", "[4, 3, 6]"]),
        ({"weights": changed(down_proj=WEIGHTS.up_proj)}, ValueError, ["down_proj", "[4, 6, 4]", "[4, 4, 6]"]),
        ({"weights": changed(down_proj=WEIGHTS.down_proj[:3])}, ValueError, ["down_proj", "[4, 6, 4]", "[3, 6, 4]"]),
        ({"weights": changed(up_bias=WEIGHTS.up_bias[:, 1:])}, ValueError, ["up_bias", "[4, 4]", "[4, 3]"]),
        ({"weights": changed(down_bias=WEIGHTS.down_bias.astype(np.float16))}, TypeError, ["down_bias", "float16"]),
        (
            {"weights": changed(up_proj=WEIGHTS.up_proj.astype(np.float64))},
            TypeError,
            ["up_proj", "float32", "float64"],
        ),
        ({"weights": changed(gate_proj=None)}, ValueError, ["gate_proj", "missing", "gated"]),
        ({"config": replace(CONFIG, gated=False)}, ValueError, ["gate_proj", "given", "gated"]),
        ({"weights": WEIGHTS.shard(0, 4)}, ValueError, ["expert"]),
        ({"weights": changed(up_proj=WEIGHTS.up_proj.tolist())}, TypeError, ["up_proj", "NumPy array", "list"]),
        (
            {"config": HUGE, "weights": Weights.random(HUGE)},
            ValueError,
            ["config.num_tokens", 2**24 - 1, f"got {2**24}"],
        ),
        ({"num_processors": 0}, ValueError, ["num_processors", "[1, 512]", "got 0"]),
        ({"num_processors": -3}, ValueError, ["num_processors", "[1, 512]", "got -3"]),
        ({"num_processors": 1.5}, TypeError, ["num_processors", "integer", "1.5"]),
        ({"num_processors": True}, TypeError, ["num_processors", "integer", "True"]),
        ({"deadline_s": 0}, ValueError, ["deadline_s", "(0, 86400]", "got 0"]),
        ({"deadline_s": -1.0}, ValueError, ["deadline_s", "(0, 86400]", "got -1.0"]),
        ({"deadline_s": float("nan")}, ValueError, ["deadline_s", "nan"]),
        ({"deadline_s": float("inf")}, ValueError, ["deadline_s", "inf"]),
        ({"deadline_s": "1"}, TypeError, ["deadline_s", "number", "'1'"]),
        ({"setup_deadline_s": 0}, ValueError, ["setup_deadline_s", "(0, 86400]", "got 0"]),
        ({"setup_deadline_s": True}, TypeError, ["setup_deadline_s", "number", "True"]),
        ({"backend": "gpu"}, ValueError, ["backend", "cpu, cuda, fibers", "'gpu'"]),
        ({"seed": 3}, TypeError, ["seed"]),
        ({"arithmetic": "pair"}, ValueError, ["arithmetic", "auto, fma, pairs, tiles", "'pair'"]),
        ({"arithmetic": 3}, TypeError, ["arithmetic", "auto, fma, pairs, tiles", "3"]),
        ({"arithmetic": "pairs"}, ValueError, ["arithmetic 'pairs'", "bfloat16", "dtype", "'float32'"]),
        ({"backend": "fibers", "arithmetic": "fma"}, TypeError, ["'fibers'", "no setting 'arithmetic'"]),
        ({"backend": "fibers", "seed": "a"}, TypeError, ["seed", "integer", "'a'"]),
        ({"backend": "fibers", "seed": -1}, ValueError, ["seed", ">= 0", "-1"]),
        ({"trace": np.zeros(2)}, TypeError, ["trace", "True or False"]),
        ({"trace": np.int64(1)}, TypeError, ["trace", "True or False"]),
        ({"num_processors": np.bool_(True)}, TypeError, ["num_processors", "integer", "True"]),
        ({"num_processors": np.int64(0)}, ValueError, ["num_processors", "[1, 512]", "got 0"]),
        ({"deadline_s": np.bool_(True)}, TypeError, ["deadline_s", "number", "True"]),
        ({"backend": "fibers", "lanes": np.bool_(True)}, ValueError, ["lanes", "integer", "True"]),
        ({"config": 3}, TypeError, ["config", "MoEConfig", "int"]),
        ({"backend": "fibers", "lames": 3}, TypeError, ["lames"]),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_layer(arguments, kind, parts):
    with raises(kind, *parts):
        FlashMoE(**({"config": CONFIG, "weights": WEIGHTS} | arguments))


@pytest.fixture(scope="module")
def layer():
    with FlashMoE(CONFIG, WEIGHTS, num_processors=1) as layer:
        yield layer


def idx_with(*row):
    wrong = IDX[1].copy()
    wrong[3] = row
    return [IDX[0], wrong]


def routed(idx=IDX, weights=FACTORS):
    return dict(topk_idx=idx, topk_weights=weights)


def ragged(*parts):
    """As NumPy makes it of parts of different lengths."""
    array = np.empty(len(parts), object)
    array[:] = parts
    return array


@pytest.mark.parametrize(
    ("x", "routing", "kind", "parts"),
    [
        (X[0], {}, ValueError, ["x", "num_ranks=2", "5"]),
        (X[:1], {}, ValueError, ["x", "num_ranks=2", "1"]),
        (None, {}, TypeError, ["x", "array", "NoneType"]),
        ([X[0], X[1].tolist()], {}, TypeError, ["x", "NumPy array", "list"]),
        ([X[0], X[1][:, :5]], {}, ValueError, ["x", "hidden=6", "[5, 5]"]),
        ([X[0], X[1][0]], {}, ValueError, ["x", "hidden=6", "[6]"]),
        (np.stack(X)[None], {}, ValueError, ["x", "num_ranks=2", "1"]),
        (np.zeros((2, 6, 6), np.float32), {}, ValueError, ["x", "num_tokens=5", "6"]),
        ([X[0], X[1].astype(np.float64)], {}, TypeError, ["x", "float32", "float64"]),
        ([X[0], X[1].astype(">f4")], {}, TypeError, ["x", "float32", ">f4"]),
        (X, {"topk_idx": IDX}, ValueError, ["topk_idx", "topk_weights"]),
        (X, {"topk_weights": FACTORS}, ValueError, ["topk_idx", "topk_weights"]),
        (X, routed(IDX[:1]), ValueError, ["topk_idx", "num_ranks=2", "1"]),
        (X, routed(weights=FACTORS[:1]), ValueError, ["topk_weights", "num_ranks=2", "1"]),
        (X, routed(idx_with(1, 1)), ValueError, ["topk_idx", "distinct", "[1, 1]", "row 3"]),
        (X, routed(idx_with(0, 5)), ValueError, ["topk_idx", "num_experts=4", "[0, 5]"]),
        (X, routed(idx_with(-2, 2)), ValueError, ["topk_idx", "[-2, 2]", "row 3"]),
        (ragged(X[0], X[1][:3]), {}, TypeError, ["x", "array of objects", "list(x)"]),
        (ragged(*X), {}, TypeError, ["x", "array of objects", "list(x)"]),
        (X, routed(ragged(*IDX)), TypeError, ["topk_idx", "array of objects", "list(topk_idx)"]),
        (X[0][:2], {}, ValueError, ["x", "num_ranks=2", "[2, 6]"]),
        (X, routed([i[:4] for i in IDX]), ValueError, ["topk_idx", "[5, 2]", "[4, 2]"]),
        (X, routed(weights=[f[:, :1] for f in FACTORS]), ValueError, ["topk_weights", "[5, 2]", "[5, 1]"]),
        (X, routed([i * 1.0 for i in IDX]), TypeError, ["topk_idx", "integer", "float64"]),
        (X, routed(weights=IDX), TypeError, ["topk_weights", "floating", "int64"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and isinstance(value[0], str) else "",
)  # fmt: skip
def test_call(layer, x, routing, kind, parts):
    expected = layer(X)
    epoch = layer.stats[0].epoch
    with raises(kind, *parts):
        layer(x, **routing)
    assert layer.stats[0].epoch == epoch, "a rank was started"
    assert_same_bits(layer(X), expected, "a call after a refused one")


def test_numpy_scalars_are_numbers(layer):
    given = dict(num_processors=np.int64(1), deadline_s=np.float32(5), trace=np.bool_(True))
    with FlashMoE(CONFIG, WEIGHTS, **given) as other:
        assert_same_bits(other(X), layer(X), "NumPy's scalars")
        assert (other.num_processors, other.deadline_s) == (1, 5.0) and other.traces
        assert type(other.num_processors) is int and type(other.deadline_s) is float
    fibers = dict(backend="fibers", num_processors=1, seed=np.uint32(4), lanes=np.array(2), preempt=np.float64(0.1))
    with FlashMoE(CONFIG, WEIGHTS, **fibers) as other:
        assert [type(getattr(other._backend, name)) for name in ("seed", "lanes", "preempt")] == [int, int, float]


def test_a_layer_of_objects_is_the_layer_of_their_names():
    heap, backend = ThreadHeap(CONFIG.num_ranks), FiberBackend(lanes=1)
    with pytest.raises(ValueError, match=r"num_processors must be in \[1, 512\], got 0"):
        FlashMoE.from_parts(CONFIG, WEIGHTS, heap, backend, num_processors=0)
    with FlashMoE(CONFIG, WEIGHTS, backend="fibers", num_processors=1, lanes=1) as layer:
        expected = layer(X)
    with FlashMoE.from_parts(CONFIG, WEIGHTS, heap, backend, num_processors=1) as other:
        assert_same_bits(other(X), expected, "a layer of objects")
        assert len(heap.segments) == CONFIG.num_ranks and backend.seed == 1, "these objects were used"
    assert heap.segments == []


def test_one_ranks_tokens_without_an_index_of_ranks():
    with FlashMoE(replace(CONFIG, num_ranks=1), WEIGHTS, backend="fibers", num_processors=1, lanes=1) as layer:
        for tokens in (X[0], X[0][:1]):
            with raises(ValueError, "x must", "num_ranks=1", list(tokens.shape), "x[None]?"):
                layer(tokens)
        with raises(ValueError, "topk_idx must", "[5, 2]", "topk_idx[None]?"):
            layer(X[0][None], topk_idx=IDX[0], topk_weights=FACTORS[0])
        assert layer(X[0][None]).shape == (1, 5, 6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_any_strides_are_accepted(dtype):
    config = tiny_config(dtype=dtype)
    x = np.stack(random_tokens(config))
    read_only, fortran, spaced = x.copy(), np.asfortranarray(x), np.repeat(x, 2, axis=2)[:, :, ::2]
    read_only.flags.writeable = False
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)
    backwards = [part[::-1] for part in x[:, ::-1]]
    assert not (fortran.flags.c_contiguous or spaced.flags.c_contiguous or unaligned.flags.aligned)
    with FlashMoE(config, Weights.random(config)) as layer:
        y, kept = layer(x), x.copy()
        for given in (read_only, fortran, spaced, unaligned, list(x), tuple(x), [fortran[0], spaced[1]]):
            assert_same_bits(np.stack(layer(given)), y, f"{type(given)}")
        assert_same_bits(layer(backwards), list(y), "rows with a negative stride")
        assert isinstance(layer(x), np.ndarray) and isinstance(layer(list(x)), list)
        assert_same_bits(x, kept, "the layer wrote into its input")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.uint64])
def test_routing_of_any_integer_type(layer, kind):
    expected = layer(X, topk_idx=IDX, topk_weights=FACTORS)
    given = np.stack(IDX).astype(kind), np.asfortranarray(np.stack(FACTORS))
    y = layer(X, topk_idx=given[0], topk_weights=given[1])
    assert_same_bits(y, expected, f"{kind}")


def test_weights_may_be_strided_and_are_not_kept():
    weights = Weights.random(CONFIG, bias=True)
    strided = replace(
        weights,
        router=np.asfortranarray(weights.router),
        up_proj=np.repeat(weights.up_proj, 2, axis=2)[:, :, ::2],
        down_proj=np.asfortranarray(weights.down_proj),
    )
    for array in (strided.router, strided.up_proj, strided.down_proj):
        assert not array.flags.c_contiguous
    with FlashMoE(CONFIG, weights) as layer, FlashMoE(CONFIG, strided) as other:
        expected = layer(X)
        assert_same_bits(other(X), expected, "strided weights")
        weights.up_proj[:], weights.router[:] = np.nan, np.nan
        assert_same_bits(layer(X), expected, "weights that changed after they were packed")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_weights_may_be_strided(dtype):
    config = tiny_config(dtype=dtype)
    weights, x = Weights.random(config), random_tokens(config)
    strided = replace(weights, up_proj=np.asfortranarray(weights.up_proj))
    with FlashMoE(config, weights) as layer, FlashMoE(config, strided) as other:
        assert_same_bits(other(x), layer(x), "strided weights")


def test_results_are_the_callers():
    """A result is not overwritten by the next call, and does not follow its input."""
    with FlashMoE(CONFIG, WEIGHTS) as layer:
        x = [part.copy() for part in X]
        first = layer(x)
        kept, routing = [part.copy() for part in first], layer.routing
        chosen = [part.topk_idx.copy() for part in routing]
        x[0][:] = 0
        layer([part[::-1] for part in X])
        assert_same_bits(first, kept, "the first result")
        assert all((a.topk_idx == b).all() for a, b in zip(routing, chosen, strict=True))


def test_before_the_first_call_and_after_the_last():
    layer = FlashMoE(CONFIG, WEIGHTS)
    for name in ("routing", "stats", "traces"):
        with raises(ValueError, "no call yet", name):
            getattr(layer, name)
    layer(X)
    layer.close()
    layer.close()
    with raises(FlashMoEError, "closed", "close()"):
        layer(X)


def test_a_layer_left_by_an_error_is_closed():
    with pytest.raises(ZeroDivisionError), FlashMoE(CONFIG, WEIGHTS) as layer:
        _ = 1 / 0
    with raises(FlashMoEError, "closed"):
        layer(X)


def test_names_at_the_root():
    assert flashmoe_numba.FlashMoE is FlashMoE and flashmoe_numba.FlashMoEError is FlashMoEError
    with pytest.raises(AttributeError, match="no attribute 'FlashMoe'"):
        _ = flashmoe_numba.FlashMoe


def test_two_layers_side_by_side_share_nothing():
    other_config = tiny_config(num_ranks=1, num_experts=3, num_topk=3, gated=False, activation="gelu")
    other_weights, other_x = Weights.random(other_config, seed=5), random_tokens(other_config)
    with FlashMoE(CONFIG, WEIGHTS) as layer, FlashMoE(other_config, other_weights) as other:
        y, other_y = layer(X), other(other_x)
        for _ in range(20):
            assert_same_bits(layer(X), y)
            assert_same_bits(other(other_x), other_y)


def test_no_warning_on_good_input():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with FlashMoE(CONFIG, WEIGHTS) as layer:
            layer(X)


def test_ranks_of_one_process_are_told_what_they_need_where_there_is_less():
    with pytest.raises(MemoryError, match=r"2 ranks need 1,073,741,824\.0 GiB each, more than .*: use .*flashmoe plan"):
        ThreadHeap(2).allocate(2**60, None)
