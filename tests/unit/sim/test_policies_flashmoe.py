"""FlashMoE's schedule: all rows once, no waiting but for inputs, and its knobs."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from policy_worlds import (
    assert_computed_once,
    kind_nodes,
    make_graph,
    odd_worlds,
    on_few_sms,
    run_both,
    small_world,
)

from sim.engine.kinds import COMBINE, DISPATCH, GATE, GEMM0, GEMM1, RECEIVE
from sim.policies import build, make_knobs
from sim.simulation import simulate

WORLDS = odd_worlds()
PACKINGS = make_knobs("flashmoe", {}).choices["packing"]

graph_of = partial(make_graph, "flashmoe")


def test_tasks_wait_for_their_own_inputs_only():
    world = small_world("zipf:1.2")
    graph = graph_of(world, tile_m=16, packing="per_source")
    kind = graph.nodes["kind"]
    for node in range(graph.num_nodes):
        before = graph.predecessors(node)
        if kind[node] == DISPATCH:
            assert (kind[before] == GATE).all() and (graph.nodes["rank"][before] == graph.nodes["rank"][node]).all()
        if kind[node] == GEMM0:  # its packet, from its peer
            [received] = before
            assert kind[received] == RECEIVE
            fields = ("rank", "peer", "expert")
            source = graph.predecessors(received)
            assert [graph.nodes[f][received] for f in fields] == [
                graph.nodes["rank"][node],
                graph.nodes["rank"][source[0]],
                graph.nodes["expert"][node],
            ]
        if kind[node] == GEMM1:
            [hidden] = before
            assert [graph.nodes[f][hidden] for f in ("rank", "expert", "m")] == [
                graph.nodes[f][node] for f in ("rank", "expert", "m")
            ]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["uniform", "top-1", "silent rank", "nothing at all", "one token"])
def test_a_combine_waits_for_its_gate_and_for_the_results_of_its_rows(name, packing):
    world = WORLDS[name]
    graph = graph_of(world, packing=packing, tile_m=16, token_block=5)
    kind, nodes = graph.nodes["kind"], graph.nodes
    for node in kind_nodes(graph, COMBINE).tolist():
        before = graph.predecessors(node)
        gates = before[kind[before] == GATE]
        rank, block = nodes["rank"][node], nodes["m"][node]
        assert nodes["rank"][gates].tolist() == [rank]
        chosen = world.routing.topk_idx[rank, block * 5 : (block + 1) * 5]
        owners = set(world.routing.owner[chosen[chosen >= 0]].tolist())
        results = before[kind[before] != GATE]
        assert set(nodes["rank"][results].tolist()) == owners
        assert (nodes["peer"][results] == rank).all()


def test_ranks_do_not_wait_for_each_other():
    """A combine may run while another rank still gates: there is no barrier."""
    world = small_world("even", num_tokens=2048, num_experts=4, num_topk=1)
    graph = graph_of(world)
    timeline = run_both(graph)
    first = timeline.start_ns[kind_nodes(graph, COMBINE)].min()
    assert first < timeline.done_ns[kind_nodes(graph, GEMM1)].max()


def test_tile_counts_are_those_of_reference():
    world = small_world("even", hidden=200, ffn=130, num_tokens=64)
    graph = graph_of(world, tile_n=128)
    assert set(graph.nodes["count"][kind_nodes(graph, GEMM0)]) == {3}  # 260 columns
    assert set(graph.nodes["count"][kind_nodes(graph, GEMM1)]) == {2}


def test_lower_tiles_and_packing_pad_less():
    world = small_world("uniform", num_tokens=40)

    def padded(**knobs):
        graph = graph_of(world, **knobs)
        return float((graph.nodes["flops"] * graph.nodes["count"])[kind_nodes(graph, GEMM0)].sum())

    apart = dict(packing="per_source")
    assert padded(**apart, ladder=True) < padded(**apart)
    assert padded(packing="per_expert") < padded(**apart)
    assert padded(packing="per_expert", ladder=True) <= padded(packing="per_expert")


@pytest.mark.parametrize("packing", ["per_source", "per_expert"])
def test_a_row_unit_pads_real_rows_and_nothing_else(packing):
    world = small_world("zipf:1.2")
    whole, units = (graph_of(world, packing=packing, tile_m=32, row_unit=unit) for unit in (None, 6))
    assert_computed_once(units, world)
    for kind in (GEMM0, GEMM1):
        nodes = kind_nodes(units, kind)
        per_row = units.nodes["flops"][nodes].max() / 36  # a full tile takes six units
        rows = np.rint(units.nodes["useful_flops"][nodes] / per_row)
        assert (np.rint(units.nodes["flops"][nodes] / per_row) == -(-rows // 6) * 6).all()
        assert (units.nodes["count"][nodes] == whole.nodes["count"][nodes]).all()


def test_reading_before_products_takes_the_sum_of_both():
    world = small_world("even", num_tokens=64, hidden=512, ffn=512)
    tflops = dict(world.hardware.tflops)
    slow = replace(world.hardware, tflops=tflops | {"bfloat16": 1.0})

    def tile_ns(hardware, **knobs):
        graph = graph_of(replace(world, hardware=hardware), rate=1.0, tile_latency_ns=0, **knobs)
        return int(graph.nodes["duration_ns"][kind_nodes(graph, GEMM1)][0])

    reading = tile_ns(replace(slow, tflops=tflops | {"bfloat16": 1e9}))
    products = tile_ns(replace(slow, hbm_gbps=1e9, l2_gbps=1e9))
    assert 0 < reading < products
    assert tile_ns(slow) == products
    assert tile_ns(slow, async_loads=False) == pytest.approx(products + reading, abs=2)


@pytest.mark.parametrize("packing", ["per_source", "per_expert"])
def test_each_tile_is_handed_out_once(packing):
    """Also where a row block has rows of many sources: the OS block's time is that of its packets and tiles."""
    world = small_world("zipf:1.2")  # of both products the last tile of a row block is not full
    graph = graph_of(world, packing=packing, poll_ns=1000, schedule_ns=100)
    nodes = graph.nodes
    received = kind_nodes(graph, RECEIVE)
    for rank in range(world.num_ranks):
        mine = nodes["rank"] == rank
        tiles = nodes["count"][mine & np.isin(nodes["kind"], (GEMM0, GEMM1))].sum()
        signals = received[mine[received]]
        spent = nodes["duration_ns"][signals].sum() - 1000 * len(signals)
        assert tiles * 100 <= spent <= tiles * 100 + len(signals)  # each is rounded up


@pytest.mark.parametrize(
    ("knobs", "slower"),
    [
        (dict(rate=0.05), True),
        (dict(rate=0.2), False),
        (dict(schedule_ns=10_000), True),
        (dict(poll_ns=500_000), True),
        (dict(tile_latency_ns=100_000), True),
    ],
)
def test_knobs_move_the_latency(knobs, slower):
    world = small_world("even", num_tokens=512, hidden=1024, ffn=1024)
    usual, changed = (
        simulate("flashmoe", world, make_knobs("flashmoe", dict(rate=0.1) | more)).timeline.makespan_ns
        for more in ({}, knobs)
    )
    assert changed > usual if slower else changed < usual


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(packing="loose"), "packing must be one of arrived, per_source, per_expert; got 'loose'"),
        (dict(rate=0.0), r"rate must be in \(0, 1\], got 0.0"),
        (dict(tile_m=0), "tile_m must be at least 1, got 0"),
        (dict(row_unit=0), "row_unit must be at least 1, got 0"),
        (dict(poll_ns=-1), "poll_ns must be at least 0, got -1"),
        (dict(speed=1), "policy flashmoe has the knobs rate, .*; got 'speed'"),
    ],
)
def test_wrong_knobs_are_refused(knobs, message):
    with pytest.raises(ValueError, match=message):
        make_knobs("flashmoe", knobs)


def test_an_unknown_policy_lists_the_good_ones():
    with pytest.raises(ValueError, match=r"policy must be one of .*flashmoe.*; got 'flashy'"):
        build("flashy", small_world())


def test_one_rank_and_eight_differ_little():
    """Communication hides: the published Scout curve differs by less than 3 % between 1 and 8 GPUs (data/)."""
    sizes = dict(hidden=5120, ffn=8192, num_experts=16, num_topk=1, num_tokens=2048)
    eight = small_world("even", num_ranks=8, hardware="8xH100", **sizes)
    one = small_world("even", num_ranks=1, hardware="8xH100", **(sizes | dict(num_experts=2)))
    knobs = dict(rate=0.22, gate=False)
    times = [simulate("flashmoe", world, make_knobs("flashmoe", knobs)).latency_us for world in (one, eight)]
    np.testing.assert_allclose(times[0], times[1], rtol=0.03)


@pytest.mark.parametrize("packing", ["per_source", "per_expert"])
def test_a_processor_waits_for_a_round_of_the_os_block(packing):
    """Before each tile of a product, as long as the OS block takes for one to each processor."""
    world = on_few_sms(small_world(), 5)
    none, some = (graph_of(world, packing=packing, scheduler="os_block", schedule_ns=ns) for ns in (0, 100))
    for kind in (GEMM0, GEMM1):
        nodes = kind_nodes(none, kind)
        longer = some.nodes["duration_ns"][nodes] - none.nodes["duration_ns"][nodes]
        assert (longer == 4 * 100).all()  # one of five is the OS block
    for kind in (RECEIVE, COMBINE):
        nodes = kind_nodes(none, kind)
        np.testing.assert_array_equal(some.nodes["duration_ns"][nodes], none.nodes["duration_ns"][nodes])


def test_one_block_is_too_few():
    with pytest.raises(ValueError, match="blocks_per_sm times the 1 SM must be at least 2, one is the OS block"):
        make_graph("flashmoe", on_few_sms(small_world(), 1))
    assert make_graph("flashmoe", on_few_sms(small_world(), 1), blocks_per_sm=2).num_tasks
