"""T3: copies that a tracker triggers, beside the product, at no slot's cost, to staggered destinations."""

from functools import partial

import numpy as np
import pytest
from policy_worlds import kind_nodes, odd_worlds, on_few_sms, run_policy, small_world

from sim.engine.graph import NONE
from sim.engine.kinds import COMBINE, GATE, GEMM0, GEMM1, SEND
from sim.policies import make_knobs

t3 = partial(run_policy, "t3")


def returns(graph):
    """The copies of results: those that wait for a part of a second product."""
    products = set(kind_nodes(graph, GEMM1).tolist())
    return [node for node in kind_nodes(graph, SEND).tolist() if products & set(graph.predecessors(node).tolist())]


@pytest.mark.parametrize("name", odd_worlds())
def test_products_follow_each_other_and_copies_follow_their_parts(name):
    graph, timeline = t3(odd_worlds()[name], tile_m=16, tile_n=64, trigger_tiles=1)
    begin, end = timeline.start_ns, timeline.done_ns
    for rank in np.unique(graph.nodes["rank"]):
        gate, up, down = (kind_nodes(graph, kind, rank) for kind in (GATE, GEMM0, GEMM1))
        if len(up):
            assert end[gate].max() <= begin[up].min() and end[up].max() <= begin[down].min()
    for node in returns(graph):
        assert graph.nodes["server"][node] == NONE
        assert begin[node] == end[graph.predecessors(node)].max()


def test_copies_run_beside_the_product():
    world = on_few_sms(small_world(num_tokens=1000, hidden=1024, ffn=512), 4)
    graph, timeline = t3(world)
    copies, products = returns(graph), kind_nodes(graph, GEMM1)
    early = timeline.done_ns[copies] < timeline.done_ns[products].max()
    assert early.mean() > 0.5


def test_memory_adds_or_a_kernel_does():
    world = small_world()
    assert len(kind_nodes(t3(world)[0], COMBINE)) == 0
    graph, timeline = t3(world, op_and_store=False)
    combines, copies = kind_nodes(graph, COMBINE), np.array(returns(graph))
    for rank in range(world.num_ranks):
        mine = copies[graph.nodes["peer"][copies] == rank]
        (combine,) = combines[graph.nodes["rank"][combines] == rank]
        assert timeline.start_ns[combine] >= timeline.done_ns[mine].max()


@pytest.mark.parametrize("stagger", [True, False])
def test_ranks_begin_with_different_destinations(stagger):
    world = on_few_sms(small_world("even", num_tokens=64, num_experts=4, num_topk=4), 2)  # 64 rows from each to each
    graph, timeline = t3(world, tile_m=16, stagger=stagger)
    copies = np.array(returns(graph))
    for rank in range(4):
        mine = copies[graph.nodes["rank"][copies] == rank]
        peers = graph.nodes["peer"][mine[np.argsort(timeline.start_ns[mine], kind="stable")]]
        seen = list(dict.fromkeys(peers.tolist()))
        assert seen == ([(rank + step) % 4 for step in (1, 2, 3, 4)] if stagger else [0, 1, 2, 3])


def test_what_is_triggered_at_once():
    world = small_world()  # three column tiles of 64
    copies = {tiles: returns(t3(world, tile_n=64, trigger_tiles=tiles)[0]) for tiles in (1, 2, 3, 9)}
    assert len(copies[1]) == 3 * len(copies[3]) and len(copies[2]) == 2 * len(copies[3])
    assert len(copies[9]) == len(copies[3])


@pytest.mark.parametrize("entries", [1, 2])
def test_no_more_parts_under_way_than_the_tracker_has_entries(entries):
    world = small_world(num_tokens=200)
    graph, timeline = t3(world, tile_m=16, tile_n=64, trigger_tiles=1, tracker_entries=entries)
    for rank in range(world.num_ranks):
        parts = kind_nodes(graph, GEMM1, rank)
        begin, end = timeline.start_ns[parts], timeline.done_ns[parts]
        under_way = [((begin <= now) & (end > now)).sum() for now in begin]
        assert max(under_way) == entries
    assert t3(world, tile_m=16)[1].makespan_ns < timeline.makespan_ns


@pytest.mark.parametrize("knob", ["trigger_tiles", "tracker_entries", "tile_m"])
def test_wrong_values_are_errors(knob):
    with pytest.raises(ValueError, match=f"{knob} must be at least 1, got 0"):
        make_knobs("t3", {knob: 0})
