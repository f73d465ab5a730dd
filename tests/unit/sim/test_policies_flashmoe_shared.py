"""Shared and zero-computation experts in FlashMoE's schedule."""

from dataclasses import replace

import numpy as np
import pytest
from policy_worlds import kind_nodes, make_graph, run_both, small_world

from sim.engine.kinds import COMBINE, DISPATCH, GATE, GEMM0, GEMM1, SHARED0, SHARED1
from sim.world.routing import ZERO, make_routing


def with_shared(world, **changes):
    return replace(world, config=replace(world.config, **changes))


@pytest.mark.parametrize("packing", ["arrived", "per_source"])
def test_all_rows_go_through_the_shared_expert_once(packing):
    world = with_shared(small_world("uniform", num_tokens=75, hidden=200), shared_ffn=130, gated=True)
    graph = make_graph("flashmoe", world, packing=packing, tile_m=32, tile_n=64, token_block=20)
    nodes, kind = graph.nodes, graph.nodes["kind"]
    c = world.config
    for product, columns, depth in ((SHARED0, 2 * 130, 200), (SHARED1, 200, 130)):
        there = kind_nodes(graph, product)
        for rank in range(c.num_ranks):
            own = there[nodes["rank"][there] == rank]
            assert set(nodes["m"][own]) == {0, 1, 2}
            assert nodes["count"][own].sum() == 3 * -(-columns // 64)
            useful = (nodes["count"] * nodes["useful_flops"])[own].sum()
            assert useful == pytest.approx(2 * 75 * columns * depth)
    for node in kind_nodes(graph, SHARED1).tolist():
        before = graph.predecessors(node)
        assert set(kind[before]) == {SHARED0} and set(nodes["m"][before]) == {nodes["m"][node]}
        assert set(nodes["rank"][before]) == {nodes["rank"][node]}
        assert nodes["count"][before].sum() == 5, "260 columns of 64"
    for node in kind_nodes(graph, COMBINE).tolist():
        before = graph.predecessors(node)
        shared = before[kind[before] == SHARED1]
        tokens = range(nodes["m"][node] * 20, min(nodes["m"][node] * 20 + 20, 75))
        assert set(nodes["m"][shared]) == {token // 32 for token in tokens}
        assert set(nodes["rank"][shared]) == {nodes["rank"][node]}
    run_both(graph)


def test_packets_leave_before_most_of_the_shared_expert():
    """More tiles than slots: those that fill slots without a gate begin at once, the others behind the dispatches."""
    world = with_shared(small_world("even", num_tokens=2048), shared_ffn=4096)
    graph = make_graph("flashmoe", world, tile_m=128, tile_n=128)
    kind, nodes, timeline = graph.nodes["kind"], graph.nodes, run_both(graph)
    slots = world.hardware.sms - 1
    early = [n for n in kind_nodes(graph, SHARED0).tolist() if GATE not in kind[graph.predecessors(n)]]
    for rank in range(world.num_ranks):
        number = nodes["count"][[n for n in early if nodes["rank"][n] == rank]].sum()
        assert number == slots - 2048 // 32
    late = np.setdiff1d(kind_nodes(graph, SHARED0), early)
    assert timeline.start_ns[kind_nodes(graph, DISPATCH)].max() <= timeline.start_ns[late].max()
    plain = run_both(make_graph("flashmoe", with_shared(world, shared_ffn=0), tile_m=128, tile_n=128))
    assert timeline.makespan_ns > plain.makespan_ns


def test_zero_choices_send_nothing_and_cost_a_row_where_they_add():
    world = small_world("uniform", num_tokens=64, num_topk=3)
    config = replace(world.config, num_zero=world.config.num_experts)
    routing = make_routing("uniform", config, 0)
    assert 0.4 < (routing.topk_idx == ZERO).mean() < 0.6, "as many of them as of others"
    assert routing.counts.sum() == (routing.topk_idx >= 0).sum()
    times = {}
    for zero in ("identity", "none"):
        one = replace(world, config=replace(config, zero=zero), routing=routing)
        graph = make_graph("flashmoe", one)
        rows = (graph.nodes["useful_flops"] * graph.nodes["count"])[kind_nodes(graph, GEMM0)].sum()
        assert rows == pytest.approx(2 * routing.counts.sum() * one.up_columns * config.hidden)
        times[zero] = graph.nodes["duration_ns"][kind_nodes(graph, COMBINE)].sum()
        assert len(kind_nodes(graph, GEMM1)) > 0
    assert times["identity"] > times["none"]
