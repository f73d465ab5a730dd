"""Calls that are kept: what may be done with them, and what is wrong with the rest, said before anything runs."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
from backward_cases import arrays_of
from cases import assert_same_bits, random_routing, random_tokens, tiny_config

from flashmoe_numba import FlashMoE
from reference import Weights
from reference.layout import SAVES

CONFIG = tiny_config()
WEIGHTS = Weights.random(CONFIG, bias=True)
X, DY = random_tokens(CONFIG), random_tokens(CONFIG, seed=1)


@pytest.fixture
def layer():
    with FlashMoE(CONFIG, WEIGHTS, backend="fibers", save="rows+up") as made:
        yield made


def test_results_have_the_bits_of_a_call_that_keeps_nothing(layer):
    expected = layer(X)
    y, _ = layer.forward(X)
    assert_same_bits(y, expected)
    with FlashMoE(CONFIG, WEIGHTS, backend="fibers") as plain:
        assert_same_bits(plain(X), expected, "a layer without save")


def test_calls_wait_for_their_backwards_in_any_order(layer):
    """Other calls in between take nothing from those that are kept."""
    inputs = [(random_tokens(CONFIG, counts, seed), random_tokens(CONFIG, counts, seed + 9)) for seed, counts in
              enumerate([(7, 7), (0, 3), (5, 0), (7, 1)])]  # fmt: skip
    alone = [layer.backward(layer.forward(x)[1], dy) for x, dy in inputs]
    saved = [layer.forward(x)[1] for x, _ in inputs]
    layer(X)
    for i in (2, 0, 3, 1):
        got = layer.backward(saved[i], inputs[i][1])
        assert_same_bits(got.x, alone[i].x, f"x of call {i}")
        for rank, weights in enumerate(got.weights):
            for name, array in arrays_of(weights).items():
                assert_same_bits(array, getattr(alone[i].weights[rank], name), f"{name} of call {i}")


def test_tokens_may_change_after_their_call(layer):
    x = [part.copy() for part in X]
    expected = layer.backward(layer.forward(x)[1], DY)
    _, saved = layer.forward(x)
    for part in x:
        part[:] = np.nan
    assert_same_bits(layer.backward(saved, DY).x, expected.x)


@pytest.mark.parametrize("save", SAVES)
def test_frozen_experts_get_no_tasks(save):
    with FlashMoE(CONFIG, WEIGHTS, backend="fibers", save=save, trace=True) as layer:
        all_of_them = layer.backward(layer.forward(X)[1], DY)
        trained = kinds_of(layer)
        some = layer.backward(layer.forward(X)[1], DY, experts=False)
        frozen = kinds_of(layer)
    assert {"WEIGHTS", "ROUTER_WEIGHTS"} <= trained and frozen == trained - {"WEIGHTS"}
    assert_same_bits(some.x, all_of_them.x)
    assert_same_bits(some.weights[0].router, all_of_them.weights[0].router)
    assert some.weights[0].num_experts == 0


def kinds_of(layer):
    from flashmoe_numba.seeing.trace import decode
    from reference.traces import TRACE_KIND_NAMES

    return {TRACE_KIND_NAMES[task.kind] for task in decode(layer.traces)}


def test_what_is_wrong_is_said_before_anything_runs(layer):
    _, saved = layer.forward(X)
    with pytest.raises(TypeError, match="saved must be what forward"):
        layer.backward(X, DY)
    with pytest.raises(ValueError, match=r"dy must have a row for each of the 7 tokens .* rank 1, got 6"):
        layer.backward(saved, [DY[0], DY[1][:6]])
    with pytest.raises((TypeError, ValueError), match=r"dy\[0\]"):
        layer.backward(saved, [part.astype(np.float64) for part in DY])
    with pytest.raises(ValueError, match=r"logits_gradient\[0\] must have shape \[7, 4\], got \[7, 3\]"):
        layer.backward(saved, DY, logits_gradient=[np.zeros((7, 3)), np.zeros((7, 4))])
    with pytest.raises(ValueError, match=r"logits_gradient\[1\] must have shape \[7, 4\], got \[7, 3\]"):
        layer.backward(saved, DY, logits_gradient=[np.zeros((7, 4)), np.zeros((7, 3))])
    with pytest.raises(TypeError, match="into must be what backward"):
        layer.backward(saved, DY, into={})
    for flag in ("experts", "router", "retain"):
        with pytest.raises(TypeError, match=f"{flag} must be True or False, got 'no'"):
            layer.backward(saved, DY, **{flag: "no"})
    with pytest.raises(TypeError, match="router must be True or False, got 0"):
        layer.no_gradients(router=0)
    with (
        FlashMoE(CONFIG, WEIGHTS, backend="fibers", save="rows") as other,
        pytest.raises(ValueError, match="another layer"),
    ):
        other.backward(saved, DY)
    assert not saved.closed
    layer.backward(saved, DY)
    assert saved.closed
    with pytest.raises(ValueError, match="call 1 had its backward, or was closed"):
        layer.backward(saved, DY)


@pytest.mark.parametrize("changes", [dict(dtype="float64"), dict(hidden=6, num_experts=6)])
def test_sums_go_on_only_where_they_are_of_the_same_arrays(changes):
    """As many numbers of another type, or in other shapes, the kernel would take for what they are not."""
    other, sums = tiny_config(**changes), []
    for config in (other, CONFIG):
        with FlashMoE(config, Weights.random(config), backend="fibers", save="rows") as layer:
            sums.append(layer.no_gradients())
            if config is CONFIG:
                _, saved = layer.forward(X)
                with pytest.raises(ValueError, match="into must be gradients of the same arrays"):
                    layer.backward(saved, DY, into=sums[0])
    sizes = [[array.size for array in of_both.arrays[0]] for of_both in sums]
    assert sizes[0] == sizes[1]


def test_copies_of_gradients_are_not_gone_on_with(layer):
    """What is written into their weights would not be in the sums."""
    _, saved = layer.forward(X)
    for copied in (copy.deepcopy(layer.no_gradients()), pickle.loads(pickle.dumps(layer.no_gradients()))):
        with pytest.raises(ValueError, match=r"into must be what backward\(\) returned, got a copy"):
            layer.backward(saved, DY, into=copied)


def test_sums_of_one_rank_go_on_whether_it_is_here_alone_or_has_comm():
    """With `comm` gradients are one rank's, not a list over ranks."""
    config = tiny_config(num_ranks=1)
    with FlashMoE(config, Weights.random(config), backend="fibers", save="rows") as alone:
        _, saved = alone.forward(X[:1])
        first = alone.backward(saved, DY[:1], retain=True)
        once = arrays_of(first.weights[0])["up_proj"].copy()
        alone.backward(saved, DY[:1], into=replace(first, weights=first.weights[0]), retain=True)
        assert np.allclose(first.weights[0].up_proj, 2 * once) and once.any()
        with pytest.raises(ValueError, match="into must be what backward"):
            alone.backward(saved, DY[:1], into=replace(first, arrays=[]))
        with FlashMoE(CONFIG, WEIGHTS, backend="fibers", save="rows") as two:
            _, saved = two.forward(X)
            with pytest.raises(ValueError, match="into must be gradients of the same arrays"):
                two.backward(saved, DY, into=replace(first, weights=first.weights[0]))


@pytest.mark.parametrize("whole", [False, True])
def test_sums_that_are_read_only_stay_as_they_are(layer, whole):
    """Compiled code would write to them in any case."""
    _, saved = layer.forward(X)
    sums = layer.backward(saved, DY, retain=True)
    (sums.arrays[1].down if whole else sums.weights[1].down_proj).setflags(write=False)
    with pytest.raises(ValueError, match="into must be gradients that can be written to, got some that are read-only"):
        layer.backward(saved, DY, into=sums)
    assert not saved.closed and not layer.closed


def test_logits_and_choices_stay_when_their_call_is_over(layer):
    _, saved = layer.forward(X)
    logits, idx = saved.logits, saved.topk_idx
    before = copy.deepcopy((logits, idx))
    saved.logits[0][:], saved.topk_idx[0][:] = np.nan, 99
    expected = layer.backward(layer.forward(X)[1], DY)
    assert_same_bits(layer.backward(saved, DY).x, expected.x, "they may be written to")
    layer.forward([-part for part in X])
    assert_same_bits(logits, before[0])
    assert_same_bits([part.view(np.float32) for part in idx], [part.view(np.float32) for part in before[1]])


def test_a_backward_looks_at_nothing_outside_of_its_turn(layer, monkeypatch):
    """Of what another thread's call may change: what is kept, the weights, and working memory that gradients are in."""
    _, saved = layer.forward(X)
    turns = []

    def note(place, name):
        found = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *given: [turns.append(layer._calls._lock.locked()), found(*given)][1])

    note(layer._backend, "to_host")
    note(saved, "peek")
    layer.backward(saved, DY)
    assert len(turns) >= 1 + 2 * len(X) and all(turns)


def test_a_closed_call_has_no_backward(layer):
    _, saved = layer.forward(X)
    saved.close()
    with pytest.raises(ValueError, match="was closed"):
        layer.backward(saved, DY)


def test_a_routing_from_outside_has_no_logits(layer):
    idx, factors = random_routing(CONFIG, (7, 7))
    _, saved = layer.forward(X, topk_idx=idx, topk_weights=factors)
    with pytest.raises(ValueError, match=r"logits_gradient\[0\] must be None where topk_weights"):
        layer.backward(saved, DY, logits_gradient=[np.zeros((7, 4))] * 2)
    found = layer.backward(saved, DY)
    assert found.logits == [None, None] and not found.weights[0].router.any()


def test_weights_that_were_loaded_since_are_not_those_of_the_call(layer):
    _, saved = layer.forward(X)
    layer.load(Weights.random(CONFIG, seed=5, bias=True))
    with pytest.raises(ValueError, match="loaded anew since"):
        layer.backward(saved, DY)
    expected = Weights.random(CONFIG, seed=5, bias=True)
    with FlashMoE(CONFIG, expected, backend="fibers", save="rows+up") as fresh:
        right = fresh.backward(fresh.forward(X)[1], DY)
    assert_same_bits(layer.backward(layer.forward(X)[1], DY).x, right.x, "both copies of the weights are loaded")


def test_other_weights_have_gradients_of_their_own(layer):
    packed = layer.pack(Weights.random(CONFIG, seed=5, bias=True))
    _, saved = layer.forward(X, weights=packed)
    found = layer.backward(saved, DY)
    with FlashMoE(CONFIG, Weights.random(CONFIG, seed=5, bias=True), backend="fibers", save="rows+up") as fresh:
        assert_same_bits(found.x, fresh.backward(fresh.forward(X)[1], DY).x)


def test_a_layer_without_save_has_no_backward():
    with FlashMoE(CONFIG, WEIGHTS, backend="fibers") as plain:
        with pytest.raises(ValueError, match="save must be given"):
            plain.forward(X)
        with pytest.raises(ValueError, match="save must be given"):
            plain.backward(None, DY)


def test_save_must_be_one_that_there_is():
    with pytest.raises(ValueError, match=r"save must be one of rows\+up, rows, nothing; got 'all'"):
        FlashMoE(CONFIG, WEIGHTS, save="all")
