"""Calls that are given to a world are the calls it makes."""

import numpy as np
import pytest

from flashmoe_numba.explore.run.spec import GivenCall, WorldSpec
from reference import MoEConfig

CONFIG = MoEConfig(num_ranks=2, num_tokens=3, hidden=5, ffn=3, num_experts=4, num_topk=2)


def test_counts_and_experts_are_the_given_ones():
    experts = (((3, 0),), ((1, 2), (2, 1)))
    spec = WorldSpec(config=CONFIG, epochs=2, given=(GivenCall((0, 3)), GivenCall((1, 2), experts)))
    (first, gate), (second, outside) = spec.calls()
    assert [len(part) for part in first] == [0, 3] and gate == [None, None]
    assert [len(part) for part in second] == [1, 2]
    assert [routing.topk_idx.tolist() for routing in outside] == [list(map(list, part)) for part in experts]
    assert all((routing.topk_weights > 0).all() for routing in outside)
    again = spec.calls()[1][1][1].topk_weights
    np.testing.assert_array_equal(outside[1].topk_weights, again)


@pytest.mark.parametrize(
    ("epochs", "call", "message"),
    [
        (2, GivenCall((1, 1)), "epochs must be the number of given calls, 1, got 2"),
        (1, GivenCall((1,)), r"counts of a given call must be num_ranks=2 numbers in \[0, num_tokens=3\], got \(1,\)"),
        (1, GivenCall((1, 4)), r"counts .* num_tokens=3\], got \(1, 4\)"),
    ],
)
def test_what_does_not_fit(epochs, call, message):
    with pytest.raises(ValueError, match=message):
        WorldSpec(config=CONFIG, epochs=epochs, given=(call,))


def test_experts_that_there_are_not():
    spec = WorldSpec(config=CONFIG, given=(GivenCall((1, 0), (((5, 0),), ())),))
    with pytest.raises(ValueError, match="num_experts=4"):
        spec.calls()
