"""Token rounding: whole tiles, by less than one tile of change, and nothing else different."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from policy_worlds import assert_computed_once, assert_link_bytes, run_both, small_world

from sim.policies import build
from sim.world.rounding import WAYS, round_tokens
from sim.world.routing import SimRouting


@st.composite
def routings(draw):
    """Distinct choices, some of them -1, and some tokens absent."""
    ranks, tokens, topk = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 4))
    experts = draw(st.integers(topk, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    order = random.permuted(np.tile(np.arange(experts), (ranks, tokens, 1)), axis=-1)
    topk_idx = order[:, :, :topk].astype(np.int32)
    topk_idx[random.random(topk_idx.shape) < draw(st.sampled_from([0, 0.3]))] = -1
    topk_idx[random.random((ranks, tokens)) < draw(st.sampled_from([0, 0.3]))] = -1
    owner = random.integers(0, ranks, experts, dtype=np.int32)
    return SimRouting(name="drawn", num_experts=experts, topk_idx=topk_idx, owner=owner)


def tokens_of(routing, expert):
    return {tuple(where) for where in np.argwhere((routing.topk_idx == expert).any(axis=-1)).tolist()}


@given(routing=routings(), tile_m=st.integers(1, 9), how=st.sampled_from(WAYS), seed=st.integers(0, 99))
def test_every_expert_has_whole_tiles_and_nothing_else_changes(routing, tile_m, how, seed):
    rounded = round_tokens(routing, tile_m, how, seed)
    before, after = routing.counts.sum(axis=0), rounded.counts.sum(axis=0)
    present = (routing.topk_idx >= 0).any(axis=-1)
    assert (after % tile_m == 0).all()
    assert (np.abs(after - before) < tile_m).all()
    if how == "down":
        assert (after <= before).all()
    elif how == "up":
        assert ((after >= before) | (-(-before // tile_m) * tile_m > present.sum())).all()
    else:
        enough = (before + tile_m // 2) // tile_m * tile_m <= present.sum()
        assert (np.abs(after - before)[enough] <= tile_m / 2).all()
    kept = rounded.topk_idx[:, :, : routing.num_topk]
    assert ((kept == routing.topk_idx) | (kept == -1)).all()
    assert not (rounded.topk_idx >= 0)[~present].any()
    ordered = np.sort(rounded.topk_idx, axis=-1)
    assert not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()
    for expert in range(routing.num_experts):  # an expert drops or takes, never both
        old, new = tokens_of(routing, expert), tokens_of(rounded, expert)
        assert old <= new or new <= old
    np.testing.assert_array_equal(rounded.owner, routing.owner)
    assert rounded.dropped == np.maximum(before - after, 0).sum()
    assert rounded.added == np.maximum(after - before, 0).sum()


@given(routing=routings(), tile_m=st.integers(2, 5))
def test_the_seed_says_which_tokens(routing, tile_m):
    one, same = round_tokens(routing, tile_m, seed=3), round_tokens(routing, tile_m, seed=3)
    np.testing.assert_array_equal(one.topk_idx, same.topk_idx)
    others = [round_tokens(routing, tile_m, seed=seed) for seed in range(20)]
    assume(routing.counts.sum() > 4 * tile_m)
    for other in others:
        np.testing.assert_array_equal(one.counts.sum(axis=0), other.counts.sum(axis=0))


def test_different_seeds_choose_different_tokens():
    routing = small_world(num_tokens=100).routing
    chosen = {round_tokens(routing, 64, "down", seed).topk_idx.tobytes() for seed in range(5)}
    assert len(chosen) == 5


def test_a_rounded_routing_makes_a_world():
    world = small_world(num_tokens=100)
    rounded = round_tokens(world.routing, 64, "up")
    assert rounded.num_topk > world.routing.num_topk
    more = replace(world, routing=rounded)
    assert more.rows.sum() == rounded.counts.sum() > world.routing.counts.sum()
    sent, received = rounded.counts.sum(axis=1).max(), more.rows.max()
    assert more.row_bytes == (sent + received) * 192 * (2 + 2) + received * 80 * 2


@pytest.mark.parametrize("policy", ["flashmoe", "t3", "nanoflow"])
@pytest.mark.parametrize("how", WAYS)
def test_policies_run_rounded_routings(policy, how):
    world = small_world("zipf:1.2", num_tokens=100)
    rounded = replace(world, routing=round_tokens(world.routing, 32, how))
    graph = build(policy, rounded)
    assert_computed_once(graph, rounded)
    assert_link_bytes(graph, run_both(graph), rounded, slack=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tile_m": 0}, r"tile_m must be an integer >= 1, got 0"),
        ({"tile_m": 2.5}, r"tile_m must be an integer >= 1, got 2.5"),
        ({"tile_m": 4, "how": "sideways"}, r"how must be one of nearest, up, down; got 'sideways'"),
        ({"tile_m": 4, "seed": -1}, r"seed must be >= 0, got -1"),
    ],
)
def test_wrong_values_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        round_tokens(small_world().routing, **arguments)
