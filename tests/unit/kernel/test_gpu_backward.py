"""Backwards of a layer on a GPU: what the host does for them, on a stand-in; their kernel interpreted on fibers."""

from dataclasses import replace

import numpy as np
import pytest
from backward_cases import Call, assert_gradients_equal
from cases import assert_same_bits, random_routing, random_tokens, tiny_config
from interpreted_gpu import make_layer
from stand_ins import nothing, without_gpu

from flashmoe_numba import FlashMoE
from flashmoe_numba.bench.backward import of_ranks
from flashmoe_numba.ptx import tensor_map
from flashmoe_numba.ptx.tensor_map import decode
from flashmoe_numba.tile_gemm.hopper import HALF_COLUMNS, ROWS
from reference import Weights
from reference.layout import SAVES

CONFIG = tiny_config(num_experts=2, num_topk=1, num_tokens=4, hidden=5, ffn=3, dtype="float64")


def on_gpu(layer, parts):
    return [layer._backend.array(part) for part in parts]


def on_host(gradients):
    """A `Gradients` of lists of NumPy's arrays."""
    ranks = of_ranks(gradients, list, lambda array: array.get())
    fields = ("x", "topk_weights", "logits", "weights")
    return type(gradients)(*([getattr(rank, name) for rank in ranks] for name in fields), gradients.arrays)


# ---- what comes out


@pytest.mark.parametrize("save", SAVES)
def test_gradients_are_the_references_whatever_is_kept(save):
    """Two calls are open at a time; tokens are gone when their gradients are asked for, and sums go on."""
    config = tiny_config(num_tokens=5, dtype="float64", shared_ffn=5, shared_gate=True, num_zero=1)
    weights = Weights.random(config, 1, bias=True)
    with make_layer(config, weights, 3, num_processors=1, save=save) as layer:
        kept = []
        for call, counts in enumerate(([5, 2], [0, 4])):
            x, dy = random_tokens(config, counts, call), random_tokens(config, counts, call + 9)
            said = [np.full((count, config.num_choices), 0.25) for count in counts] if call else None
            tokens = on_gpu(layer, x)
            _, saved = layer.forward(tokens)
            kept.append((x, dy, said, saved, layer.routing))
            for part in tokens:
                part[...] = np.nan
        for x, dy, said, saved, routing in kept[::-1]:
            found = layer.backward(saved, on_gpu(layer, dy), logits_gradient=said, retain=True)
            assert_gradients_equal(Call(dy, said, routing, on_host(found)), x, weights, config, {})
            again = layer.backward(saved, on_gpu(layer, dy), logits_gradient=said, into=found)
            sums = [of_rank.up_proj.get() for of_rank in again.weights]
            assert_same_bits(sums, [of_rank.up_proj.get() for of_rank in found.weights], "the same memory")
        assert layer._life.epoch == 6 and layer._life.epochs() == [6, 6]


def test_sums_go_on_where_they_are():
    x, dy = random_tokens(CONFIG), random_tokens(CONFIG, seed=1)
    with make_layer(CONFIG, Weights.random(CONFIG), num_processors=1, save="rows") as layer:
        _, saved = layer.forward(on_gpu(layer, x))
        once = layer.backward(saved, on_gpu(layer, dy), retain=True)
        before = [of_rank.down_proj.get() for of_rank in once.weights]
        twice = layer.backward(saved, on_gpu(layer, dy), into=once)
        for first, both in zip(before, twice.weights, strict=True):
            np.testing.assert_allclose(both.down_proj.get(), 2 * first, rtol=1e-12)
        for of_rank, arrays in zip(twice.weights, once.arrays, strict=True):
            assert of_rank.router.data.ptr == arrays.router.data.ptr


def test_a_copy_of_gradients_is_no_place_to_go_on():
    x = random_tokens(CONFIG)
    with make_layer(CONFIG, Weights.random(CONFIG), num_processors=1, save="rows") as layer:
        _, saved = layer.forward(on_gpu(layer, x))
        copied = replace(layer.no_gradients(), weights=layer.no_gradients().weights)
        with pytest.raises(ValueError, match=r"into must be what backward\(\) returned, got a copy"):
            layer.backward(saved, on_gpu(layer, x), into=copied)


def test_forwards_and_backwards_count_the_same_epochs():
    x = random_tokens(CONFIG)
    weights = Weights.random(CONFIG)
    with make_layer(CONFIG, weights, num_processors=1, save="rows+up") as layer:
        expected = [part.get() for part in layer(on_gpu(layer, x))]
        y, saved = layer.forward(on_gpu(layer, x))
        layer.backward(saved, on_gpu(layer, x))
        assert_same_bits([part.get() for part in y], expected)
        assert_same_bits([part.get() for part in layer(on_gpu(layer, x))], expected)
        assert [stats.epoch for stats in layer.stats] == [4, 4]


def test_what_is_kept_can_be_read_on_the_host():
    x, counts = random_tokens(CONFIG), [CONFIG.num_tokens] * 2
    idx, factors = random_routing(CONFIG, counts)
    with make_layer(CONFIG, Weights.random(CONFIG), num_processors=1, save="nothing") as layer:
        _, routed = layer.forward(on_gpu(layer, x), topk_idx=idx, topk_weights=factors)
        _, own = layer.forward(on_gpu(layer, x))
        assert_same_bits([part.astype(np.int64) for part in routed.topk_idx], idx)
        assert [part.shape for part in routed.logits] == [(4, 0)] * 2
        np.testing.assert_allclose(own.logits[1], x[1] @ Weights.random(CONFIG).router.T, rtol=1e-12)
        taken = sum(a.nbytes for kept in own.peek(layer._ranks) for g in vars(kept.arrays).values() for a in g.values())
        assert own.num_bytes == taken, "memory is taken whole on a GPU"


# ---- the order of streams


def test_a_backward_is_put_on_the_callers_stream_and_waits_for_nothing(monkeypatch):
    x = random_tokens(CONFIG)
    with make_layer(CONFIG, Weights.random(CONFIG), num_processors=1, save="rows") as layer:
        tokens, gpu, waits = on_gpu(layer, x), layer._backend.gpu, []
        for verb in ("wait_for_device", "wait_for_stream"):
            monkeypatch.setattr(gpu.cupy.queues, verb, lambda *_: waits.append(1))
        end = ["copy_rows", "launch", "copy_out", "record"]
        _, saved = layer.forward(tokens)
        gpu.log.clear()
        _, saved = layer.forward(tokens)
        assert [verb for verb, _ in gpu.log] == ["wait_for", *["copy_on_device"] * CONFIG.num_ranks, *end]
        gpu.log.clear()
        layer.backward(saved, tokens)
        assert [verb for verb, _ in gpu.log] == ["wait_for", *["copy_in"] * CONFIG.num_ranks, *end]
        assert {stream for _, stream in gpu.log} == {gpu.caller.ptr}
        assert waits == []


def test_a_call_on_another_stream_waits_for_arrays_made_in_cupys_own():
    with make_layer(CONFIG, Weights.random(CONFIG), num_processors=1, save="rows") as layer:
        gpu = layer._backend.gpu
        own, theirs = gpu.caller.ptr, gpu.cupy.cuda.Stream(non_blocking=True)
        gpu.log.clear()
        layer._backend._stream = theirs.ptr
        layer._backend._wait_for_cupy()
        assert gpu.log == [("record", own), ("wait_for", theirs.ptr)]


def test_a_call_that_is_kept_cannot_be_captured():
    x = random_tokens(CONFIG)
    rule = r"forward\(\) and backward\(\) must not be captured in a CUDA graph"
    with make_layer(CONFIG, Weights.random(CONFIG), num_processors=1, save="rows") as layer:
        tokens, gpu = on_gpu(layer, x), layer._backend.gpu
        expected = [part.get() for part in layer(tokens)]
        _, saved = layer.forward(tokens)
        with gpu.captured():
            with pytest.raises(ValueError, match=rule):
                layer.forward(tokens)
            with pytest.raises(ValueError, match=rule):
                layer.backward(saved, tokens, retain=True)
        assert not saved.closed
        layer.backward(saved, tokens)
        assert_same_bits([part.get() for part in layer(tokens)], expected)


# ---- tensor maps


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("gated", [False, True])
def test_the_maps_of_a_backward_show_its_arrays(monkeypatch, gated, save):
    """Weights that were transposed, and the rows that they multiply: of dy as they come, and of gradients."""
    sizes = dict(hidden=72, ffn=40, shared_ffn=24, tile_n=128, tile_m=64, tile_m_min=8)
    config = tiny_config(dtype="float16", gated=gated, **sizes)
    with without_gpu(monkeypatch, nothing, capability=(9, 0)) as cupy:
        layer = FlashMoE(config, Weights.random(config), backend="cuda", num_processors=1, save=save)
        with layer:
            rank, of_rank = layer._ranks[0], layer.packed.transposed[0]
            tokens = [cupy.asarray(part) for part in random_tokens(config)]
            _, saved = layer.forward(tokens)
            (kept, _), dy = saved.peek(layer._ranks), [cupy.asarray(part) for part in random_tokens(config)]
            layer.backward(saved, dy)
            working, parts = rank.working, config.expert_kind.num_ups
            shown = [
                (of_rank.up, working.up_gradients, parts * config.ffn, config.hidden, 128),
                (of_rank.down, rank.segments.dispatch, config.hidden, config.ffn, 128 // parts),
                (of_rank.shared_up, working.shared_up_gradients, parts * 24, config.hidden, 128),
                (of_rank.shared_down, dy[0], config.hidden, 24, 128 // parts),
                (rank.experts.shared_up, kept.x, config.hidden, 24, 128 // parts),
            ]
            if save != "rows+up":
                rows = rank.segments.again if save == "nothing" else kept.arrays.received["kept_rows"]
                shown.append((of_rank.up_again, rows, config.hidden, config.ffn, 128 // parts))
                assert of_rank.up_again.first.data.ptr == rank.experts.up.first.data.ptr, "no third copy"
            for packed, rows, depth, columns, tile_n in shown:
                first, _, *of_rows = map(decode, packed.maps.get().reshape(-1, tensor_map.NUM_WORDS))
                assert (packed.depth, packed.columns, packed.tile_n) == (depth, columns, tile_n)
                assert (first.address, first.sizes[:2]) == (packed.first.data.ptr, [depth, columns])
                assert first.box == [64, HALF_COLUMNS, 1]
                assert [found.box for found in of_rows] == [[64, height] for height in (*ROWS, 1)]
                assert {(found.address, *found.sizes) for found in of_rows} == {
                    (rows.data.ptr, depth, rows.size // depth)
                }
            ups = [rank.experts.up.first, rank.experts.up.second][:parts]
            transposed = of_rank.up.first.get().reshape(-1, config.hidden, parts, config.ffn)
            for part, up in enumerate(ups):
                of_part = up.get().reshape(-1, config.ffn, config.hidden)
                np.testing.assert_array_equal(transposed[:, :, part], of_part.transpose(0, 2, 1))
