"""Placing and copying experts moves rows between ranks and changes nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import MoEConfig
from sim.world import placement
from sim.world.placement import balance, place_copies
from sim.world.routing import make_routing

SKEWED = ("zipf:0.8", "zipf:1.5", "hot", "hot-rank")


def make_config(**fields):
    return MoEConfig(**(dict(num_ranks=4, num_tokens=300, hidden=8, ffn=8, num_experts=16, num_topk=4) | fields))


def busiest(routing):
    """Rows on the rank that has most."""
    return np.bincount(routing.owner, routing.counts.sum(axis=0), routing.num_ranks).max()


def logical_of(routing, balanced):
    """The expert of which each expert of `balanced` is a copy."""
    replicas = balanced.num_experts - routing.num_experts
    return place_copies(routing.counts.sum(axis=0), routing.num_ranks, replicas).ravel()


@st.composite
def cases(draw):
    """(routing, replicas), dropped choices among them."""
    num_ranks, per_rank = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    num_experts = num_ranks * per_rank
    num_tokens = draw(st.integers(1, 30))
    sizes = dict(num_ranks=num_ranks, num_experts=num_experts, num_tokens=num_tokens)
    capacity = draw(st.none() | st.integers(1, num_tokens))
    config = make_config(**sizes, num_topk=draw(st.integers(1, num_experts)), capacity=capacity)
    routing = make_routing(draw(st.sampled_from(("even", "uniform", *SKEWED))), config, draw(st.integers(0, 5)))
    return routing, num_ranks * draw(st.integers(0, per_rank * (num_ranks - 1)))


@given(cases())
def test_choices_go_to_copies_of_their_experts(case):
    routing, replicas = case
    before = routing.topk_idx.copy()
    balanced = balance(routing, replicas)
    np.testing.assert_array_equal(routing.topk_idx, before)
    assert balanced.num_experts == routing.num_experts + replicas
    assert balanced.topk_idx.dtype == np.int32
    expert_or_none = np.append(logical_of(routing, balanced), -1)
    np.testing.assert_array_equal(expert_or_none[balanced.topk_idx], routing.topk_idx)  # so they stay distinct
    assert balanced.counts.sum() == routing.counts.sum()


@given(cases())
def test_ranks_hold_equally_many_experts_and_none_twice(case):
    routing, replicas = case
    balanced = balance(routing, replicas)
    assert set(np.bincount(balanced.owner).tolist()) == {balanced.num_experts // routing.num_ranks}
    logical = logical_of(routing, balanced)
    assert set(logical.tolist()) == set(range(routing.num_experts))
    placed = set(zip(balanced.owner.tolist(), logical.tolist(), strict=True))
    assert len(placed) == balanced.num_experts


@given(cases())
def test_a_source_uses_its_own_copy_and_the_others_in_turn(case):
    routing, replicas = case
    balanced = balance(routing, replicas)
    logical = logical_of(routing, balanced)
    for expert in range(routing.num_experts):
        copies = np.flatnonzero(logical == expert)
        holders = balanced.owner[copies]
        for copy, rank in zip(copies, holders, strict=True):
            assert balanced.counts[rank, copy] == routing.counts[rank, expert]
        others = np.setdiff1d(np.arange(routing.num_ranks), holders)
        assert np.ptp(balanced.counts[np.ix_(others, copies)].sum(axis=0)) <= 1


@given(cases())
def test_without_replicas_the_busiest_rank_is_never_busier(case):
    routing, _ = case
    assert busiest(balance(routing)) <= busiest(routing)


@pytest.mark.parametrize("replicas", [0, 4, 16, 48])
@pytest.mark.parametrize("name", SKEWED)
@pytest.mark.parametrize("sizes", [{}, dict(num_topk=1), dict(num_ranks=16, num_tokens=32), dict(num_ranks=2)])
def test_skewed_routings_get_better(name, sizes, replicas):
    config = make_config(**sizes)
    replicas = min(replicas, 16 * (config.num_ranks - 1)) // config.num_ranks * config.num_ranks
    routing = make_routing(name, config)
    assert busiest(balance(routing, replicas)) <= busiest(routing)


@pytest.mark.parametrize("name", SKEWED)
def test_a_copy_of_all_experts_everywhere_keeps_all_rows_at_home(name):
    routing = make_routing(name, make_config())
    everywhere = balance(routing, 48)
    assert (everywhere.owner[everywhere.topk_idx] == np.arange(4)[:, None, None]).all()
    assert busiest(everywhere) == 300 * 4


def test_enough_copies_level_one_hot_expert():
    routing = make_routing("hot", make_config(num_ranks=8, num_topk=1))
    assert busiest(routing) == 8 * 300
    assert busiest(balance(routing, 8)) == 300


def test_copies_go_to_the_highest_load_per_copy():
    load = np.array([12, 1, 7, 4, 0, 0])
    for replicas, expected in [(0, [1] * 6), (3, [3, 1, 2, 1, 1, 1]), (6, [3, 1, 3, 3, 1, 1])]:
        placed = place_copies(load, 3, replicas)
        assert np.bincount(placed.ravel()).tolist() == expected
    assert np.bincount(place_copies(np.array([12, 1, 10, 4, 0]), 5, 5).ravel()).tolist() == [3, 1, 3, 2, 1]


def test_the_busiest_go_first_to_the_least_busy():
    assert place_copies(np.array([9, 8, 1, 2, 5, 5]), 3).tolist() == [[0, 2], [1, 3], [4, 5]]


def test_blocks_stay_where_greed_is_worse():
    load = np.array([3, 3, 0, 2, 2, 2])  # greed: 3 + 2 + 2 and 3 + 2 + 0
    assert place_copies(load, 2).tolist() == [[0, 1, 2], [3, 4, 5]]


@given(st.data(), st.integers(1, 7), st.integers(1, 5))
def test_no_rank_holds_two_copies_for_any_loads(data, num_ranks, per_rank):
    num_experts = num_ranks * per_rank
    load = np.array(data.draw(st.lists(st.integers(0, 20), min_size=num_experts, max_size=num_experts)))
    replicas = num_ranks * data.draw(st.integers(0, per_rank * (num_ranks - 1)))
    placed = place_copies(load, num_ranks, replicas)
    assert placed.shape == (num_ranks, (num_experts + replicas) // num_ranks)
    assert (np.diff(placed, axis=1) > 0).all()
    assert set(placed.ravel().tolist()) == set(range(num_experts))


def test_an_expert_moves_where_there_is_room_only_beside_a_copy(monkeypatch):
    calls, original = [], placement._make_room
    monkeypatch.setattr(placement, "_make_room", lambda *args: calls.append(1) or original(*args))
    placed = place_copies(np.zeros(3, int), 3, 3)  # expert 2 finds room on rank 0 only, once it is there
    assert calls == [1]
    assert placed.tolist() == [[1, 2], [0, 1], [0, 2]]


def test_who_moves_leaves_the_least_behind_and_is_not_there_already():
    share = np.array([4, 4.5, 2, 5, 1])
    holds = np.array([[1, 0], [1, 1], [0, 1], [0, 1], [0, 1]], bool)  # expert 0 wants a second copy, rank 1 is full
    total, room = share @ holds, np.array([2, 0])
    assert placement._make_room(0, holds, total, room, share) == 1
    assert holds[3].tolist() == [True, False]  # 13.5 and 11.5 rows then; expert 1 would be better, but is on both
    assert total.tolist() == [13.5, 7.5]
    assert room.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("replicas", "error", "rule"),
    [
        (1.0, TypeError, "replicas must be an integer, got 1.0"),
        (True, TypeError, "replicas must be an integer, got True"),
        (-4, ValueError, r"replicas must be in \[0, num_experts \* \(num_ranks - 1\) = 48\], got -4"),
        (52, ValueError, r"= 48\], got 52"),
        (3, ValueError, "num_experts=16 .* multiple of num_ranks=4, got replicas=3"),
    ],
)
def test_replicas_are_checked(replicas, error, rule):
    with pytest.raises(error, match=rule):
        balance(make_routing("uniform", make_config()), replicas)
