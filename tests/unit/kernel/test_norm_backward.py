"""Gradients through a norm of experts' results, where drawn layers (tests/property) do not come."""

from dataclasses import replace

import numpy as np
import pytest
from backward_cases import arrays_of, assert_close, assert_weights_equal
from cases import assert_same_bits, random_routing, random_tokens, tiny_config
from kinds import NORMED

from flashmoe_numba import FlashMoE
from flashmoe_numba.seeing.trace import decode
from reference import Weights, moe_layer_backward
from reference.layout import SAVES
from reference.task_kinds import NORM_WEIGHTS, WEIGHTS

CONFIG = tiny_config(expert=NORMED, dtype="float64")
WEIGHTS_OF = Weights.random(CONFIG, bias=True)
X, DY = random_tokens(CONFIG), random_tokens(CONFIG, seed=1)
BACKENDS = [dict(backend="cpu"), dict(backend="fibers", lanes=3)]


def norm_tasks(layer):
    return sorted((task.rank, task.n) for task in decode(layer.traces) if task.kind == NORM_WEIGHTS)


@pytest.mark.parametrize("settings", BACKENDS)
def test_a_scale_of_several_column_tiles(settings):
    """More columns than a task has, by several processors; the last task has fewer."""
    config = tiny_config(expert=NORMED, dtype="float64", hidden=300)
    weights, x, dy = Weights.random(config, bias=True), random_tokens(config), random_tokens(config, seed=1)
    with FlashMoE(config, weights, save="rows", num_processors=3, trace=True, **settings) as layer:
        found = layer.backward(layer.forward(x)[1], dy)
        assert norm_tasks(layer) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    exact = moe_layer_backward(x, dy, weights, config)
    assert_weights_equal(f"{config}", found.weights, exact.weights, config)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("settings", BACKENDS)
def test_what_is_kept_is_the_calls_own(save, settings):
    """Results of later calls come to the same place, before the backwards."""
    others = random_tokens(CONFIG, [7, 2], seed=2)
    with FlashMoE(CONFIG, WEIGHTS_OF, save=save, **settings) as layer:
        _, first = layer.forward(X)
        _, second = layer.forward(others)
        layer(random_tokens(CONFIG, seed=3))
        for saved, x, dy in ((second, others, random_tokens(CONFIG, [7, 2], seed=4)), (first, X, DY)):
            found = layer.backward(saved, dy)
            exact = moe_layer_backward(x, dy, WEIGHTS_OF, CONFIG)
            assert_weights_equal(save, found.weights, exact.weights, CONFIG)
            for rank in range(2):
                assert_close(f"x[{rank}]", found.x[rank], exact.x[rank])
                assert_close(f"logits[{rank}]", found.logits[rank], exact.logits[rank])


def test_frozen_experts_have_no_scale_and_no_task_for_it():
    with FlashMoE(CONFIG, WEIGHTS_OF, backend="fibers", save="rows", trace=True) as layer:
        trained = layer.backward(layer.forward(X)[1], DY)
        assert norm_tasks(layer) == [(0, 0), (1, 0)]
        frozen = layer.backward(layer.forward(X)[1], DY, experts=False)
        assert not {task.kind for task in decode(layer.traces)} & {WEIGHTS, NORM_WEIGHTS}
        of_router = layer.backward(layer.forward(X)[1], DY, router=False)
        assert norm_tasks(layer) == [(0, 0), (1, 0)]
    assert_same_bits(frozen.x, trained.x)
    assert_same_bits(frozen.logits, trained.logits)
    assert all(weights.result_scale is None for weights in frozen.weights)
    for one, other in zip(of_router.weights, trained.weights, strict=True):
        assert_same_bits(one.result_scale, other.result_scale)


@pytest.mark.parametrize("settings", BACKENDS)
def test_a_result_that_has_no_weight_spoils_nothing(settings):
    """It is infinite, and nobody has kept it; its pair was sent, all the same."""
    idx, factors = random_routing(CONFIG, [7, 7])
    for rank, row, choice in ((0, 0, 0), (0, 6, 1), (1, 3, 0)):
        factors[rank][row, choice] = 0
    lonely = idx[0][0, 0]  # the expert of one of these pairs, and of no other
    for rank in range(2):
        taken = np.argwhere(idx[rank] == lonely).tolist()
        for row, choice in taken:
            factors[rank][row, choice] = 0
    down = WEIGHTS_OF.down_proj.copy()
    down[lonely] *= 1e308
    weights = replace(WEIGHTS_OF, down_proj=down)
    with FlashMoE(CONFIG, weights, save="rows+up", **settings) as layer:
        _, saved = layer.forward(X, topk_idx=idx, topk_weights=factors)
        for rank, kept in zip(layer._ranks, saved.peek(layer._ranks), strict=True):
            for array in (kept.arrays.tokens["kept_results"], rank.working.norms, rank.working.norm_dots):
                array[:] = np.nan
        saved.close()
        _, saved = layer.forward(X, topk_idx=idx, topk_weights=factors)
        found = layer.backward(saved, DY)
    with np.errstate(all="ignore"):
        exact = moe_layer_backward(X, DY, weights, CONFIG, idx, factors)
    for rank in range(2):
        assert_close(f"x[{rank}]", found.x[rank], exact.x[rank])
        assert_close(f"topk_weights[{rank}]", found.topk_weights[rank], exact.topk_weights[rank])
        assert not found.topk_weights[rank][factors[rank] == 0].any()
    assert np.isfinite(exact.weights.result_scale).all()
    assert_weights_equal("no weight", found.weights, exact.weights, CONFIG)


def test_a_result_that_is_not_finite_spoils_its_own_token():
    weights, x = WEIGHTS_OF, [part.copy() for part in X]
    x[1][3] = 1e200
    with FlashMoE(CONFIG, weights, backend="fibers", save="rows") as layer:
        chosen = random_routing(CONFIG, [7, 7])
        given = dict(zip(("topk_idx", "topk_weights"), chosen, strict=True))
        found = layer.backward(layer.forward(x, **given)[1], DY)
        clean = layer.backward(layer.forward(X, **given)[1], DY)
    assert not np.isfinite(found.x[1][3]).any() and np.isnan(found.weights[1].result_scale).all()
    for rank, (got, right) in enumerate(zip(found.x, clean.x, strict=True)):
        keep = np.arange(len(right)) != (3 if rank == 1 else -1)
        assert_same_bits(got[keep], right[keep], f"rank {rank}")
    assert_same_bits(found.weights[0].result_scale, clean.weights[0].result_scale, "of a rank's own tokens")


def test_ranks_add_up_their_own_tokens():
    """The scale's gradient is each rank's own, as the router's, and all ranks' add up to that of one."""
    with FlashMoE(CONFIG, WEIGHTS_OF, backend="fibers", save="rows") as layer:
        found = layer.backward(layer.forward(X)[1], DY)
    alone = replace(CONFIG, num_ranks=1, num_tokens=14)
    with FlashMoE(alone, WEIGHTS_OF, backend="fibers", save="rows") as layer:
        (whole,) = layer.backward(layer.forward([np.concatenate(X)])[1], [np.concatenate(DY)]).weights
    parts = [arrays_of(of_rank)["result_scale"] for of_rank in found.weights]
    assert (parts[0] != parts[1]).all()
    assert_close("result_scale", parts[0] + parts[1], whole.result_scale)
