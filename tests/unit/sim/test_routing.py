"""Routings have the distributions they claim and the structure that reference/ gives the same choices."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference import COMBINE, GEMM1, MoEConfig, make_packets, make_workload, task_graph
from reference.arrays import stream
from reference.runs import packet_tile_height
from sim.drafting.blocks import token_block_packets
from sim.world.drawn import _raced, _redrawn
from sim.world.routing import SimRouting, make_routing, packet_slots

NAMES = ("even", "uniform", "zipf:0.7", "zipf:3", "hot", "hot-rank", "text")


def make_config(**fields):
    return MoEConfig(**(dict(num_ranks=4, num_tokens=50, hidden=8, ffn=8, num_experts=12, num_topk=3) | fields))


def without_capacity(config):
    return replace(config, capacity=None)


def make_sim_routing(topk_idx, num_experts):
    idx = np.asarray(topk_idx, np.int32)
    owner = np.arange(num_experts, dtype=np.int32) % len(idx)
    return SimRouting(name="by hand", num_experts=num_experts, topk_idx=idx, owner=owner)


def assert_distinct(topk_idx):
    ordered = np.sort(topk_idx, axis=-1)
    assert not ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()


def assert_shares(counts, shares):
    """Counts of independent draws with these probabilities, none of them off by more than five standard deviations."""
    total, shares = counts.sum(), np.asarray(shares)
    assert (np.abs(counts - total * shares) <= 5 * np.sqrt(total * shares * (1 - shares)) + 1e-9).all(), counts


@st.composite
def configs(draw):
    num_ranks = draw(st.integers(1, 5))
    num_experts = num_ranks * draw(st.integers(1, 5))
    num_topk = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(1, 40))
    capacity = draw(st.none() | st.integers(1, num_tokens))
    sizes = dict(num_ranks=num_ranks, num_experts=num_experts, num_topk=num_topk, num_tokens=num_tokens)
    return make_config(**sizes, capacity=capacity, tile_m=4, tile_m_min=1, token_block=draw(st.integers(1, 9)))


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        dict(num_ranks=1, num_tokens=1, num_experts=1, num_topk=1),
        dict(num_ranks=4, num_experts=4, num_topk=4),
        dict(num_experts=8, num_topk=1, dtype="bfloat16"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_every_name_gives_distinct_experts_and_the_same_again(name, sizes):
    config = make_config(**sizes)
    routing, again = make_routing(name, config, seed=3), make_routing(name, config, seed=3)
    assert routing.topk_idx.shape == (config.num_ranks, config.num_tokens, config.num_topk)
    assert (routing.num_ranks, routing.num_tokens, routing.num_topk) == routing.topk_idx.shape
    assert routing.topk_idx.min() >= 0
    assert_distinct(routing.topk_idx)
    np.testing.assert_array_equal(routing.topk_idx, again.topk_idx)
    assert routing.owner.tolist() == [config.owner(expert) for expert in range(config.num_experts)]
    if not sizes:
        assert not np.array_equal(routing.topk_idx, make_routing(name, config, seed=4).topk_idx)


@given(configs(), st.integers(0, 3))
def test_even_is_even_for_each_source_in_total_and_over_the_tokens(config, seed):
    routing = make_routing("even", without_capacity(config), seed)
    assert_distinct(routing.topk_idx)
    assert np.ptp(routing.counts, axis=1).max() <= 1
    assert np.ptp(routing.counts.sum(axis=0)) <= 1
    chosen = (routing.topk_idx[..., None] == np.arange(config.num_experts)).any(axis=2)
    so_far = np.cumsum(chosen, axis=1)  # after each token: the last round's circle may add 1 to what was off by 1
    assert np.ptp(so_far, axis=2).max() <= 2


def test_even_mixes_experts():
    routing = make_routing("even", make_config(num_tokens=2000, num_experts=16, num_topk=4))
    with_expert_0 = (routing.topk_idx == 0).any(axis=2)
    assert len(np.unique(routing.topk_idx[with_expert_0])) == 16
    assert not np.array_equal(routing.topk_idx[0], routing.topk_idx[1])


@pytest.mark.parametrize(("num_experts", "num_topk"), [(5, 2), (4, 3), (4, 4), (6, 1)])
def test_uniform_draws_every_order_equally_often(num_experts, num_topk):
    config = make_config(num_ranks=1, num_tokens=30000, num_experts=num_experts, num_topk=num_topk)
    rows = [tuple(row) for row in make_routing("uniform", config).topk_idx[0].tolist()]
    orders = list(permutations(range(num_experts), num_topk))
    assert_shares(np.array([rows.count(order) for order in orders]), np.full(len(orders), 1 / len(orders)))


@pytest.mark.parametrize("draw", [_redrawn, _raced])
def test_zipf_draws_one_after_the_other(draw):
    popularity = np.arange(1, 6) ** -1.3
    picks = draw(np.log(popularity), 30000, 3, stream(0, 0))
    rows = [tuple(row) for row in picks.tolist()]
    orders = list(permutations(range(5), 3))
    shares = []
    for first, second, third in orders:
        left = popularity.sum() - popularity[first]
        share = popularity[first] / popularity.sum() * popularity[second] / left
        shares.append(share * popularity[third] / (left - popularity[second]))
    assert_shares(np.array([rows.count(order) for order in orders]), shares)


@pytest.mark.parametrize(("exponent", "num_experts"), [(0, 16), (1, 64), (2.5, 8), (60, 32)])
def test_zipf_exponent_sets_the_shares(exponent, num_experts):
    config = make_config(num_ranks=1, num_tokens=20000, num_experts=num_experts, num_topk=1)
    counts = make_routing(f"zipf:{exponent}", config).counts[0]
    popularity = np.arange(1.0, num_experts + 1) ** -exponent
    if exponent:
        counts = np.sort(counts)[::-1]
        assert_shares(np.array([counts[0], counts[1:].sum()]), [1 / popularity.sum(), 1 - 1 / popularity.sum()])
    else:
        assert_shares(counts, popularity / popularity.sum())


@pytest.mark.parametrize("digits", [39, 400])
def test_zipf_of_any_steepness_is_one_expert_first(digits):
    counts = make_routing("zipf:" + "9" * digits, make_config(num_topk=1)).counts.sum(axis=0)
    assert sorted(counts.tolist())[-2:] == [0, 200]


def test_zipf_deals_popularity_to_experts_by_the_seed():
    hottest = {int(make_routing("zipf:2", make_config(), seed).counts.sum(axis=0).argmax()) for seed in range(20)}
    assert len(hottest) > 5


@pytest.mark.parametrize("num_topk", [1, 3, 12])
def test_hot_names_choose_first_where_they_say(num_topk):
    config = make_config(num_tokens=3000, num_topk=num_topk)
    hot, hot_rank = make_routing("hot", config).topk_idx, make_routing("hot-rank", config).topk_idx
    assert (hot[..., 0] == 0).all()
    assert_shares(np.bincount(hot_rank[..., 0].ravel(), minlength=12), [1 / 3] * 3 + [0] * 9)
    if num_topk > 1:
        assert_shares(np.bincount(hot[..., 1].ravel(), minlength=12), [0] + [1 / 11] * 11)
        after_expert_2 = hot_rank[hot_rank[..., 0] == 2][:, 1]
        assert_shares(np.bincount(after_expert_2, minlength=12), [1 / 11] * 2 + [0] + [1 / 11] * 9)


def test_text_sends_equal_words_to_equal_experts_wherever_they_are():
    config = make_config(num_tokens=500, num_experts=16)
    topk_idx = make_routing("text", config).topk_idx
    x = np.concatenate(make_workload("text", make_config(num_tokens=500, num_experts=16)).x)
    _, word = np.unique(x, axis=0, return_inverse=True)
    expert_of_word = {}
    for key, experts in zip(word.tolist(), topk_idx.reshape(-1, 3).tolist(), strict=True):
        assert expert_of_word.setdefault(key, experts) == experts
    assert len({tuple(experts) for experts in expert_of_word.values()}) > len(expert_of_word) / 2
    one_rank = make_routing("text", make_config(num_ranks=1, num_tokens=2000, num_experts=16)).topk_idx
    np.testing.assert_array_equal(topk_idx.reshape(one_rank.shape), one_rank)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("capacity", [1, 7, 50])
def test_capacity_drops_what_the_reference_drops(name, capacity):
    config = make_config(capacity=capacity)
    whole, kept = make_routing(name, make_config()), make_routing(name, config)
    for rank in range(config.num_ranks):
        packets = make_packets(whole.topk_idx[rank], config)
        expected = np.where(packets.slot < 0, -1, whole.topk_idx[rank])
        np.testing.assert_array_equal(kept.topk_idx[rank], expected)
        np.testing.assert_array_equal(kept.counts[rank], packets.sent)
    assert kept.dropped == whole.counts.sum() - kept.counts.sum()


@pytest.mark.parametrize("name", ["", "Even", "zipf", "zipf:-1", "zipf:nan", "even:2", "hot_rank"])
def test_unknown_names_list_the_good_ones(name):
    with pytest.raises(ValueError, match=r"even, uniform, zipf:s .*, hot, hot-rank, text, a path .*; got '"):
        make_routing(name, make_config())
    with pytest.raises(TypeError, match="name must be a string, one of: even"):
        make_routing(None, make_config())


@pytest.mark.parametrize(
    ("changes", "error", "rule"),
    [
        (dict(topk_idx=np.zeros((2, 3), np.int32)), ValueError, r"topk_idx must have shape \[any, any, any\]"),
        (dict(topk_idx=np.zeros((2, 3, 1))), TypeError, "topk_idx must have dtype int32, got float64"),
        (dict(topk_idx=np.full((2, 3, 1), -3, np.int32)), ValueError, r"topk_idx must have values in \[-2, 4\)"),
        (dict(topk_idx=np.full((2, 3, 1), 4, np.int32)), ValueError, r"topk_idx must have values in \[-2, 4\)"),
        (dict(owner=np.zeros(5, np.int32)), ValueError, r"owner must have shape \[4\], got \[5\]"),
        (dict(owner=np.full(4, 2, np.int32)), ValueError, r"owner must have values in \[0, 2\)"),
    ],
)
def test_routing_checks_its_arrays(changes, error, rule):
    good = dict(name="", num_experts=4, topk_idx=np.zeros((2, 3, 1), np.int32), owner=np.zeros(4, np.int32))
    assert SimRouting(**good).counts.tolist() == [[3, 0, 0, 0], [3, 0, 0, 0]]
    with pytest.raises(error, match=rule):
        SimRouting(**(good | changes))


@given(configs(), st.sampled_from(NAMES))
def test_slots_are_those_of_the_reference(config, name):
    dropless = without_capacity(config)
    routing = make_routing(name, dropless)
    slots = packet_slots(routing.topk_idx, config.num_experts)
    for rank, choices in enumerate(routing.topk_idx):
        np.testing.assert_array_equal(slots[rank], make_packets(choices, dropless).slot)


def test_slots_skip_what_goes_nowhere():
    topk_idx = np.array([[[2, -1], [-1, 2], [2, 0]], [[-1, -1], [0, 2], [1, 0]]], np.int32)
    assert packet_slots(topk_idx, 3).tolist() == [[[0, -1], [-1, 1], [2, 0]], [[-1, -1], [0, 0], [0, 1]]]
    many = np.where(topk_idx < 0, -1, topk_idx + 40000)  # too many experts for 16 bits
    np.testing.assert_array_equal(packet_slots(many, 40003), packet_slots(topk_idx, 3))


@given(st.data(), configs(), st.sampled_from(NAMES))
def test_block_packets_by_brute_force(data, config, name):
    routing = make_routing(name, config)
    heights = np.array(
        [[data.draw(st.integers(1, 5)) for _ in range(config.num_experts)] for _ in range(config.num_ranks)]
    )
    expected, next_slot = set(), np.zeros(heights.shape, int)
    for rank, choices in enumerate(routing.topk_idx.tolist()):
        for token, experts in enumerate(choices):
            for expert in experts:
                if expert >= 0:
                    row_block = next_slot[rank, expert] // heights[rank, expert]
                    expected.add((rank, token // config.token_block, expert, int(row_block)))
                    next_slot[rank, expert] += 1
    found = token_block_packets(routing, heights, config.token_block)
    assert {column.dtype for column in found} == {np.dtype(np.int64)}
    columns = (found.rank, found.block, found.expert, found.row_block)
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == sorted(expected)


@given(configs(), st.sampled_from(NAMES))
def test_block_packets_are_what_the_reference_combines_wait_for(config, name):
    routing = make_routing(name, config)
    whole = make_routing(name, without_capacity(config)).topk_idx
    graph = task_graph([make_packets(choices, config) for choices in whole], config)
    waits = {
        (task.m, task.rank, tile.rank * config.num_experts_per_rank + tile.expert, tile.m)
        for task, tiles in graph.items()
        if task.kind == COMBINE
        for tile in tiles
        if tile.kind == GEMM1
    }
    heights = np.array([[packet_tile_height(rows, config) for rows in counts] for counts in routing.counts.tolist()])
    found = token_block_packets(routing, heights, config.token_block)
    assert len(found.block) == len(waits)
    assert set(zip(*(column.tolist() for column in found), strict=True)) == waits


def test_block_packets_of_nothing():
    nothing = token_block_packets(make_sim_routing(np.full((2, 3, 2), -1), 4), np.ones((2, 4), int), 2)
    assert [column.tolist() for column in nothing] == [[], [], [], []]
    no_tokens = token_block_packets(make_sim_routing(np.zeros((2, 0, 2)), 4), np.ones((2, 4), int), 2)
    assert [column.tolist() for column in no_tokens] == [[], [], [], []]


@pytest.mark.parametrize(
    ("heights", "token_block", "error", "rule"),
    [
        (np.ones((2, 3), int), 2, ValueError, r"row_height must have shape \[2, 4\], got \[2, 3\]"),
        (np.ones((2, 4)), 2, TypeError, "row_height must have an integer dtype, got float64"),
        (np.zeros((2, 4), int), 2, ValueError, "row_height must be >= 1, got 0"),
        (np.ones((2, 4), int), 0, ValueError, "token_block must be >= 1, got 0"),
    ],
)
def test_block_packets_check_their_arguments(heights, token_block, error, rule):
    with pytest.raises(error, match=rule):
        token_block_packets(make_sim_routing(np.zeros((2, 3, 1)), 4), heights, token_block)
