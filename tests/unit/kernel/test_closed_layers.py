"""What users still have of a layer that was closed holds no more than it must."""

import gc
import tracemalloc

import numpy as np
import pytest
from cases import random_tokens, tiny_config

from flashmoe_numba import FlashMoE, FlashMoEError
from reference import Weights
from reference.layout import SAVES

# rows dwarf weights, so that an array of the layer's cannot hide behind these
CONFIG = tiny_config(num_tokens=4000, hidden=24, ffn=40)
WEIGHTS = Weights.random(CONFIG, bias=True)
MATRICES = ("gate_proj", "up_proj", "down_proj")


def traced():
    """Bytes of arrays that were made since the traces began, and are there."""
    gc.collect()
    arrays = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)])
    return sum(trace.size for trace in arrays.traces)


def use(config, weights, save, num_tokens=3):
    """(an open layer that made a forward and a backward, what users have of it, tokens that are kept)."""
    layer = FlashMoE(config, weights, backend="fibers", save=save)
    other = layer.pack(weights)
    x = [part[:num_tokens] for part in random_tokens(config)]
    _, saved = layer.forward(x)
    _, used = layer.forward(x, weights=other)
    layer.backward(used, x)
    return layer, saved, (layer.packed, other)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("orderly", [True, False])
def test_what_is_left_is_the_weights(save, orderly):
    small = tiny_config()
    use(small, Weights.random(small), save)[0].close()  # what is made once
    tracemalloc.start()
    try:
        layer, saved, packed = use(CONFIG, WEIGHTS, save)
        open_bytes = traced()
        layer._close(orderly=orderly)
        left = traced()
    finally:
        tracemalloc.stop()
    weight_bytes = sum(a.nbytes for a in vars(WEIGHTS).values() if isinstance(a, np.ndarray))
    assert open_bytes > 100 * weight_bytes
    assert left < 4 * weight_bytes, (left, weight_bytes)  # two packed copies, padded: 158,656 bytes
    assert saved.closed and saved.num_tokens == [3, 3] and saved.epoch == 1
    out = Weights.random(CONFIG, seed=1)
    for each in packed:
        each.unpack(out)
        assert all(np.array_equal(getattr(out, name), getattr(WEIGHTS, name)) for name in MATRICES)


def test_a_call_that_was_kept_is_closed_with_its_layer():
    x = [part[:3] for part in random_tokens(CONFIG)]
    with FlashMoE(CONFIG, WEIGHTS, backend="fibers", save="rows") as layer:
        _, saved = layer.forward(x)
        packed = layer.packed
        assert not saved.closed and [len(idx) for idx in saved.topk_idx] == [3, 3]
    assert saved.closed
    with pytest.raises(ValueError, match=r"^saved must not have been used before: call 1 .* or its layer was$"):
        saved.topk_idx  # noqa: B018
    with pytest.raises(FlashMoEError, match=r"^this layer is closed: close\(\) was called$"):
        layer.backward(saved, x)
    with pytest.raises(FlashMoEError, match=r"^the layer that packed these weights is closed: they can be unpacked"):
        packed.load(WEIGHTS)
    saved.close()  # once more does nothing


def test_a_layer_that_is_closed_while_weights_are_packed_has_none_of_them(monkeypatch):
    """By another thread, say."""
    layer = FlashMoE(CONFIG, WEIGHTS, backend="fibers", save="rows")
    packing = layer._ranks[1].packing
    pack = packing.pack

    def closed_meanwhile(weights):
        layer.close()
        return pack(weights)

    monkeypatch.setattr(packing, "pack", closed_meanwhile)
    with pytest.raises(FlashMoEError, match=r"^this layer is closed: close\(\) was called$"):
        layer.pack(WEIGHTS)
