"""Memory of gradients that nobody has any more is that of the next ones, which show nothing of what was there."""

import gc

import numpy as np
import pytest
from backward_cases import arrays_of
from cases import assert_same_bits, random_tokens, tiny_config

from flashmoe_numba import FlashMoE
from reference import Weights

CONFIG = tiny_config(num_ranks=1, num_experts=4, num_topk=1)
WEIGHTS = Weights.random(CONFIG, bias=True)
TOKENS = CONFIG.num_tokens


def to(*experts):
    """(x, dy, topk_idx, topk_weights) of a call that goes round these experts."""
    idx = np.resize(np.array(experts), (TOKENS, 1)).astype(np.int32)
    return random_tokens(CONFIG), random_tokens(CONFIG, seed=1), [idx], [np.ones((TOKENS, 1), CONFIG.accumulator)]


def gradients(layer, *experts, **changes):
    x, dy, idx, factors = to(*experts)
    _, saved = layer.forward(x, topk_idx=idx, topk_weights=factors)
    return layer.backward(saved, dy, **changes)


def addresses(found):
    weights = found.weights[0]
    return weights.up_proj.ctypes.data, weights.down_proj.ctypes.data


@pytest.fixture
def layer():
    with FlashMoE(CONFIG, WEIGHTS, backend="fibers", save="rows") as made:
        yield made


def check_like_new(found, *experts):
    """The bits of a layer that had no call before."""
    with FlashMoE(CONFIG, WEIGHTS, backend="fibers", save="rows") as new:
        for name, array in arrays_of(gradients(new, *experts).weights[0]).items():
            assert_same_bits(getattr(found.weights[0], name), array, name)


def test_what_was_dropped_is_used_again_and_shows_nothing(layer):
    found = gradients(layer, 0, 1, 2, 3)
    first = addresses(found)
    found.weights[0].up_proj[:], found.weights[0].down_proj[:] = np.nan, np.inf
    del found
    again = gradients(layer, 3, 1, 0)  # expert 2 has no rows
    assert addresses(again) == first
    check_like_new(again, 3, 1, 0)


@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_what_somebody_has_is_left_alone(layer, name):
    found = gradients(layer, 0, 1, 2, 3)
    view = getattr(found.weights[0], name)[1:, ::2].T
    expected = view.copy()
    del found
    again = gradients(layer, 0, 1, 2, 3)
    assert not np.may_share_memory(view, getattr(again.weights[0], name))
    assert_same_bits(view, expected)
    check_like_new(again, 0, 1, 2, 3)


def test_sums_that_go_on_are_somebody_s(layer):
    found = gradients(layer, 0, 1, 2, 3)
    first = addresses(found)
    more = gradients(layer, 0, 1, 2, 3, into=found)
    del found
    assert addresses(gradients(layer, 0, 1, 2, 3)) != first
    del more
    assert addresses(gradients(layer, 0, 1, 2, 3)) == first


def test_frozen_experts_leave_it_there(layer):
    first = addresses(gradients(layer, 0, 1, 2, 3))
    assert gradients(layer, 0, experts=False).weights[0].up_proj.size == 0
    assert addresses(gradients(layer, 0, 1, 2)) == first


def test_where_most_experts_have_no_rows_it_is_not_kept(layer):
    gradients(layer, 2)
    assert layer.packed.sums[0]._free == {}
    check_like_new(gradients(layer, 1), 1)


def test_other_weights_have_memory_of_their_own(layer):
    packed = layer.pack(Weights.random(CONFIG, seed=1, bias=True))
    first = addresses(gradients(layer, 0, 1, 2, 3))
    x, dy, idx, factors = to(0, 1, 2, 3)
    found = layer.backward(layer.forward(x, topk_idx=idx, topk_weights=factors, weights=packed)[1], dy)
    assert not set(addresses(found)) & set(first)
    del found
    assert {name for sums in packed.sums for name in sums._free} == {"up", "down"}


def test_gradients_outlive_their_layer():
    with FlashMoE(CONFIG, WEIGHTS, backend="fibers", save="rows") as layer:
        found = gradients(layer, 0, 1, 2, 3)
    del layer
    gc.collect()
    check_like_new(found, 0, 1, 2, 3)
