"""Routings at the edge of what kinds allow: rows without any choice, and logits that leave their type's range."""

import numpy as np
import pytest
from cases import random_tokens, tiny_config

from flashmoe_numba import FlashMoE
from reference import RouterKind, Weights


@pytest.mark.parametrize("kind", [RouterKind(choice="given", renormalize=True), RouterKind(choice="given", scale=2.0)])
def test_a_token_that_chose_nothing_gets_a_row_of_zeros(kind):
    """Twice on one layer: weights of the first call must not be taken for those of the second."""
    config = tiny_config(num_ranks=1, router=kind, renormalize=kind.renormalize)
    x = random_tokens(config)
    chosen = [np.tile(np.arange(2), (7, 1))]
    with FlashMoE(config, Weights.random(config), backend="fibers") as layer:
        full = layer(x, topk_idx=chosen)[0]
        chosen[0][2] = -1
        rest = layer(x, topk_idx=chosen)[0]
        np.testing.assert_array_equal(layer.routing[0].topk_weights[2], 0)
        assert layer.stats[0].nonfinite_tokens == 0
    others = np.arange(7) != 2
    np.testing.assert_array_equal(rest[others], full[others])
    np.testing.assert_array_equal(rest[2], 0)


def test_logits_that_a_scale_takes_out_of_range_spoil_their_token_only():
    kind = RouterKind(choice="score", logit_scale=4.0)
    config = tiny_config(num_ranks=1, num_tokens=2, router=kind, renormalize=False)
    logits = np.array([[1, 2e38, 0, 0], [1, 2, 0, 0]], np.float32)
    with FlashMoE(config, Weights.random(config), backend="fibers") as layer:
        y = layer(random_tokens(config), logits=[logits])[0]
        routing = layer.routing[0]
    np.testing.assert_array_equal(routing.topk_idx, [[0, 1], [1, 0]])
    assert np.isnan(routing.topk_weights[0]).all() and np.isnan(y[0]).all()
    assert np.isfinite(routing.topk_weights[1]).all() and np.isfinite(y[1]).all()
