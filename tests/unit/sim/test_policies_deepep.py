"""DeepEP: rows that cross each link once, kernels that wait for their own rank, and knobs that do what they say."""

from dataclasses import replace
from functools import partial
from math import ceil

import numpy as np
import pytest
from policy_worlds import assert_computed_once, assert_link_bytes, kind_nodes, odd_worlds, run_policy, small_world

from sim.drafting.comm_sms import analytic_comm_sms
from sim.drafting.hops import make_hops
from sim.engine.kinds import BARRIER, COMBINE, DISPATCH, GATE, GEMM0, GEMM1, KIND_NAMES, LAUNCH, SEND, SHARED0
from sim.policies import make_knobs
from sim.simulation import simulate
from sim.validation.published import bottleneck_gbps

WORLDS = odd_worlds() | {
    "three nodes, the last half empty": small_world(num_ranks=5, num_experts=10, num_topk=3, hardware="3x2xH100"),
    "fp8": small_world(precision_name="fp8", hidden=256, hardware="2x2xH100"),
}

deepep = partial(run_policy, "deepep", mode="normal")


def carried(graph, timeline, name):
    """`[num_ranks]`, bytes of the links of a name."""
    return np.array([timeline.link_bytes[i] for i, link in enumerate(graph.links) if link.name == name])


def ranks_of(world):
    """For each (source, token), the ranks it goes to."""
    for source, tokens in enumerate(world.routing.topk_idx):
        for choices in tokens:
            yield source, {int(world.routing.owner[expert]) for expert in choices[choices >= 0]}


def demanded_hops(world):
    """Rows out of and into each rank, token by token: {"NVLink": [2, ranks], "NIC": [2, ranks]} on the way there."""
    per_node, ranks = world.hardware.gpus_per_node, world.num_ranks
    rows = {"NVLink": np.zeros((2, ranks)), "NIC": np.zeros((2, ranks))}
    for source, targets in ranks_of(world):
        for node in {rank // per_node for rank in targets}:
            here = [rank for rank in range(ranks) if rank // per_node == node]
            relay = source if source in here else here[source % per_node % len(here)]
            if relay != source:
                rows["NIC"][0, source] += 1
                rows["NIC"][1, relay] += 1
            for rank in targets & set(here) - {relay}:
                rows["NVLink"][0, relay] += 1
                rows["NVLink"][1, rank] += 1
    return rows


TWO_HALVES = [name for name, world in WORLDS.items() if world.config.num_tokens > 1]


@pytest.mark.parametrize(("name", "batches"), [*((name, 1) for name in WORLDS), *((name, 2) for name in TWO_HALVES)])
def test_rows_cross_each_link_once_there_and_back(name, batches):
    world = WORLDS[name]
    graph, timeline = deepep(world, micro_batches=batches, chunk_rows=7, window_rows=15)
    assert_computed_once(graph, world)
    there, back = (world.config.hidden * size for size in (world.precision.token_bytes, world.precision.result_bytes))
    for name, (out, into) in demanded_hops(world).items():
        np.testing.assert_array_equal(carried(graph, timeline, f"{name} out"), out * there + into * back)
        np.testing.assert_array_equal(carried(graph, timeline, f"{name} in"), into * there + out * back)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, values) for name in WORLDS for values in ({}, {"combine": "row_block"})),
        *((name, {"micro_batches": 2}) for name in TWO_HALVES),
    ],
)
def test_low_latency_sends_a_row_to_each_expert(name, values):
    world = WORLDS[name]
    graph, timeline = deepep(world, mode="low_latency", **values)
    assert_computed_once(graph, world)
    assert_link_bytes(graph, timeline, world, slack=1)  # packets are cut into equal parts, rounded up
    assert len(kind_nodes(graph, BARRIER)) == 0
    assert all("host" not in graph.servers[i].name for i in set(graph.nodes["server"].tolist()) - {-1})


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
@pytest.mark.parametrize("name", WORLDS)
def test_kernels_wait_for_their_own_rank(name, mode):
    """A rank multiplies when its rows are there, sends results when it has all, and sums when they are back."""
    world = WORLDS[name]
    graph, timeline = deepep(world, mode=mode)
    nodes = graph.nodes
    for rank in range(world.num_ranks):
        came = kind_nodes(graph, DISPATCH)[nodes["peer"][kind_nodes(graph, DISPATCH)] == rank]
        sums = kind_nodes(graph, COMBINE, rank)
        back = kind_nodes(graph, SEND)[nodes["peer"][kind_nodes(graph, SEND)] == rank]
        products, second = kind_nodes(graph, GEMM0, rank), kind_nodes(graph, GEMM1, rank)
        if products.size:
            assert timeline.done_ns[came].max() <= timeline.start_ns[products].min()
            assert timeline.done_ns[products].max() <= timeline.start_ns[second].min()
            sent = kind_nodes(graph, SEND, rank)
            assert timeline.done_ns[second].max() <= timeline.start_ns[sent].min()
        if back.size:
            assert timeline.done_ns[back].max() <= timeline.done_ns[sums].max()
        assert timeline.done_ns[sums].max() >= timeline.done_ns[kind_nodes(graph, GATE, rank)].max()


def test_a_token_is_summed_after_its_own_chunks():
    """By token blocks and chunks of one token, each sum waits for exactly the nodes that its token went to."""
    world = small_world(hardware="2x2xH100", num_tokens=11)
    graph, _ = deepep(world, token_block=1, chunk_rows=1, window_rows=1, stages="combine")
    visited = [{rank // 2 for rank in ranks} for _, ranks in ranks_of(world)]
    for node, nodes in zip(kind_nodes(graph, COMBINE), visited, strict=True):
        before = graph.predecessors(node)
        sends = before[graph.nodes["kind"][before] == SEND]
        assert {int(graph.nodes["rank"][send]) // 2 for send in sends} == nodes
        assert set(graph.nodes["peer"][sends].tolist()) == {int(graph.nodes["rank"][node])}


def test_forwarding_waits_for_the_chunk_it_forwards():
    world = small_world(hardware="2x2xH100")
    graph, timeline = deepep(world, stages="dispatch", chunk_rows=4)
    forwards = 0
    for node in kind_nodes(graph, DISPATCH):
        for before in graph.predecessors(node):
            if graph.nodes["kind"][before] == DISPATCH and graph.nodes["peer"][before] == graph.nodes["rank"][node]:
                forwards += graph.nodes["rank"][before] != graph.nodes["rank"][node]
                assert timeline.done_ns[before] <= timeline.start_ns[node]
    assert forwards > 20


def test_hops_by_brute_force():
    world = WORLDS["three nodes, the last half empty"]
    hops = make_hops(world, 5, 8)
    shares = np.zeros((5, 5), int)
    np.add.at(shares, (hops.source[hops.share_chunk], hops.share_rank), hops.share_rows)
    want = np.zeros((5, 5), int)
    for source, ranks in ranks_of(world):
        want[source, list(ranks)] += 1
    np.testing.assert_array_equal(shares, want)
    assert hops.rows.max() == 5
    assert (hops.share_rows <= hops.rows[hops.share_chunk]).all()
    for source in range(5):
        mine = [ranks for origin, ranks in ranks_of(world) if origin == source]
        for block in range(9):
            tokens = mine[8 * block : 8 * block + 8]
            assert hops.copies[source, block] == sum(map(len, tokens))
            assert hops.visits[source, block] == sum(len({rank // 2 for rank in ranks}) for ranks in tokens)


# ---- knobs


@pytest.mark.parametrize(
    ("mode", "stages", "kinds"),
    [
        ("normal", "dispatch", {"DISPATCH", "BARRIER", "JOIN"}),
        ("normal", "combine", {"SEND", "COMBINE", "BARRIER", "JOIN"}),
        ("low_latency", "dispatch", {"DISPATCH", "JOIN"}),
        ("low_latency", "combine", {"SEND", "COMBINE", "JOIN"}),
    ],
)
def test_stages_alone(mode, stages, kinds):
    world = small_world()
    graph, timeline = deepep(world, mode=mode, stages=stages)
    assert {KIND_NAMES[kind] for kind in graph.nodes["kind"]} == kinds
    assert timeline.makespan_ns < deepep(world, mode=mode)[1].makespan_ns


def test_few_multiprocessors_cannot_keep_the_links_busy():
    world = small_world("even", num_tokens=2000, hidden=1024)
    one, four, many = (deepep(world, stages="dispatch", comm_sms=sms)[1].makespan_ns for sms in (1, 4, 24))
    rows = sum(len(ranks) for source, ranks in ranks_of(world) if source == 0)
    assert one >= rows * 1024 * 2 / world.hardware.sm_write_gbps  # one multiprocessor writes all, its own rank's too
    assert one > 3 * four > 3 * many


def test_a_window_hides_the_latency_of_links():
    world = small_world("even", num_tokens=2000, hidden=1024)
    small, usual = (deepep(world, stages="dispatch", window_rows=rows)[1].makespan_ns for rows in (16, 256))
    assert small > 1.5 * usual
    _, timeline = deepep(world, stages="dispatch", chunk_rows=16, window_rows=32)
    assert max(timeline.link_peak) <= 2 * 3  # two chunks to or from each of three peers


def test_two_micro_batches_overlap_and_cost_multiprocessors():
    world = small_world("even", num_tokens=4096, hidden=2048, ffn=2048, hardware="4xH800")
    graph, timeline = deepep(world, micro_batches=2, comm_sms=20)
    assert {server.slots for server in graph.servers if server.name == "SM slots"} == {132 - 20}
    products = kind_nodes(graph, GEMM0, 0)
    sends = kind_nodes(graph, DISPATCH, 0)
    assert timeline.start_ns[products].min() < timeline.done_ns[sends].max()
    assert timeline.makespan_ns < deepep(world, comm_sms=20)[1].makespan_ns
    low, _ = deepep(small_world(), mode="low_latency", micro_batches=2)
    assert {server.slots for server in low.servers if server.name == "SM slots"} == {132}


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_kernels_of_two_micro_batches_keep_their_order(mode):
    world = small_world("even", num_tokens=512, hidden=512, ffn=512)
    graph, timeline = deepep(world, mode=mode, micro_batches=2)
    for rank in range(world.num_ranks):
        first, second = np.split(kind_nodes(graph, GEMM0, rank), 2)  # two row blocks of each expert, even routing
        half = np.split(kind_nodes(graph, GEMM1, rank), 2)[0]
        assert timeline.done_ns[first].max() <= timeline.done_ns[half].max() <= timeline.start_ns[second].min()


def test_each_row_block_sends_its_own_results():
    world = small_world()
    graph, _ = deepep(world, mode="low_latency", combine="row_block")
    for send in kind_nodes(graph, SEND):
        before = graph.predecessors(send)
        (product,) = before[graph.nodes["kind"][before] == GEMM1]
        assert graph.nodes["rank"][product] == graph.nodes["rank"][send]
        assert graph.nodes["m"][product] == graph.nodes["m"][send]


@pytest.mark.parametrize(("hardware", "rows"), [("8xH100", 8), ("2x4xH100", 2)])
def test_sums_read_a_row_from_each_rank_or_node(hardware, rows):
    world = small_world("even", num_ranks=8, num_tokens=64, hidden=4096, num_topk=8, hardware=hardware)  # to all ranks
    graph, _ = deepep(world, stages="combine")
    read = 32 * rows * 4096 * 2 / world.hardware.sm_read_gbps
    written = 32 * 4096 * 2 / world.hardware.sm_write_gbps
    assert set(graph.nodes["duration_ns"][kind_nodes(graph, COMBINE)]) == {ceil(max(read, written))}


def test_a_window_is_of_one_source_and_one_way():
    """With one chunk under way, a chunk waits for the one before of the same source on the same hop."""
    world = small_world(hardware="2x2xH100")
    graph, _ = deepep(world, stages="combine", chunk_rows=8, window_rows=8)
    hops = make_hops(world, 8, 32)
    relay = hops.relay[hops.share_chunk]
    streams = [(*key, "share") for key in zip(hops.share_rank, relay, hops.source[hops.share_chunk], strict=True)]
    streams += [(*key, "chunk") for key in zip(hops.relay, hops.source, strict=True)]
    streams = [key for key in streams if key[0] != key[1]]
    sends = [send for send in kind_nodes(graph, SEND) if graph.nodes["rank"][send] != graph.nodes["peer"][send]]
    waits = 0
    for send in sends:
        before = graph.predecessors(send)
        same = [graph.nodes[name][before] == graph.nodes[name][send] for name in ("kind", "rank", "peer")]
        waits += np.logical_and.reduce(same).sum()
    assert waits == len(streams) - len(set(streams))


def test_row_blocks_leave_when_they_are_done():
    world = small_world("even", num_tokens=2048, hidden=2048, ffn=1024, hardware="4xH800")
    by_block, by_kernel = (deepep(world, mode="low_latency", combine=way) for way in ("row_block", "kernel"))
    assert by_block[1].makespan_ns < by_kernel[1].makespan_ns
    for (graph, timeline), early in ((by_block, True), (by_kernel, False)):
        products, sends = kind_nodes(graph, GEMM1, 0), kind_nodes(graph, SEND, 0)
        assert (timeline.start_ns[sends].min() < timeline.done_ns[products].max()) == early


def test_low_latency_has_no_host():
    """Few tokens: no counts to wait for, and graph nodes instead of launches."""
    world = small_world(num_tokens=8)
    assert deepep(world, mode="low_latency")[1].makespan_ns < deepep(world)[1].makespan_ns - 20_000
    graph, _ = deepep(world)
    # gate, layout, notify, counts read, dispatch, 5 for experts, combine
    assert len(kind_nodes(graph, LAUNCH)) == 4 * 11


def test_gate_and_cluster():
    world = small_world("even", num_tokens=1000, hidden=1024, ffn=1024)
    usual = deepep(world)[1].makespan_ns
    graph, timeline = deepep(world, gate=False)
    assert len(kind_nodes(graph, GATE)) == 0
    assert timeline.makespan_ns < usual
    assert deepep(world, cluster=1, rate=1.0)[1].makespan_ns > deepep(world, cluster=4, rate=1.0)[1].makespan_ns


@pytest.mark.parametrize(("tokens", "mode"), [(1, "low_latency"), (255, "low_latency"), (256, "normal")])
def test_the_mode_follows_the_tokens_unless_it_is_set(tokens, mode):
    world = small_world(num_tokens=tokens)
    chosen = simulate("deepep", world)
    assert chosen.knobs.mode == mode
    np.testing.assert_equal(chosen.graph.nodes, deepep(world, mode=mode)[0].nodes)
    for given in ("normal", "low_latency"):
        assert simulate("deepep", world, make_knobs("deepep", {"mode": given})).knobs.mode == given
    np.testing.assert_equal(run_policy("deepep", world)[0].nodes, chosen.graph.nodes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "fast"}, "mode must be one of normal, low_latency"),
        ({"stages": "experts"}, "stages must be one of layer, dispatch, combine"),
        ({"combine": "row_block"}, "combine must be kernel in mode normal"),
        ({"micro_batches": 3}, "micro_batches must be 1 or 2, got 3"),
        ({"comm_sms": 0}, "comm_sms must be at least 1"),
        ({"comm_sms": 132}, "comm_sms must be less than the 132 of the GPU, got 132"),
        ({"chunk_rows": 300}, "window_rows must be at least chunk_rows=300, got 256"),
    ],
)
def test_wrong_knobs(values, message):
    with pytest.raises(ValueError, match=message):
        deepep(small_world(), **values)


def test_one_token_has_no_two_halves():
    with pytest.raises(ValueError, match="micro_batches must be at most num_tokens=1, got 2"):
        deepep(WORLDS["one token"], micro_batches=2)


@pytest.mark.parametrize(("mode", "batches"), [("normal", 1), ("normal", 2), ("low_latency", 1), ("low_latency", 2)])
def test_a_shared_expert_runs_beside_the_dispatch_and_is_summed(mode, batches):
    plain = small_world(
        "even", num_tokens=2000, hidden=1024, num_topk=8
    )  # reading 5 rows takes longer than writing one
    world = replace(plain, config=replace(plain.config, shared_ffn=256))
    graph, timeline = deepep(world, mode=mode, micro_batches=batches)
    shared = kind_nodes(graph, SHARED0)
    sent = kind_nodes(graph, DISPATCH)
    assert timeline.start_ns[shared].min() < timeline.done_ns[sent].max()
    useful = (graph.nodes["useful_flops"] * graph.nodes["count"])[shared].sum()
    assert useful == pytest.approx(4 * 2000 * 2 * 1024 * 512)
    summed = [combine_bytes_time(deepep(one, mode=mode, micro_batches=batches)[0]) for one in (plain, world)]
    assert summed[1] > summed[0]


def combine_bytes_time(graph):
    sums = kind_nodes(graph, COMBINE)
    return (graph.nodes["duration_ns"] * graph.nodes["count"])[sums].sum()


# ---- figures of DeepEP's own


@pytest.mark.parametrize(("hardware", "ranks", "count"), [("2x8xH100", 16, 12), ("4x8xH100", 32, 6)])
def test_analytic_count_is_that_of_the_published_table(hardware, ranks, count):
    """DeepEP V2's README: 12 multiprocessors for EP 8 x 2 on SM90, 6 for EP 8 x 4; 256 experts, top 8."""
    world = small_world(num_ranks=ranks, num_experts=256, num_topk=8, num_tokens=4, hardware=hardware)
    assert analytic_comm_sms(world) == count


def test_analytic_count_of_one_node():
    world = small_world(num_ranks=8, num_experts=256, num_topk=8, num_tokens=4)
    needed = ceil(1.25 * (world.hardware.nvlink_gbps / world.hardware.sm_write_gbps) / (7 / 8))
    assert analytic_comm_sms(world) == needed + needed % 2
    assert analytic_comm_sms(small_world(num_ranks=1)) == 4


@pytest.mark.parametrize("stage", ["dispatch", "combine"])
def test_bottleneck_bandwidth_counts_what_stays_local(stage):
    for world, by_node in ((small_world(precision_name="fp8"), False), (WORLDS["fp8"], True)):
        size = world.config.hidden * (1 + 4 / 128 if stage == "dispatch" else 2)
        per_node = world.hardware.gpus_per_node if by_node else 1
        rows = sum(len({rank // per_node for rank in ranks}) for _, ranks in ranks_of(world))
        assert bottleneck_gbps(world, stage, 1000) == pytest.approx(rows / world.num_ranks * size / 1000)


def test_a_busy_link_shows_in_the_bottleneck_bandwidth():
    """A dispatch bound by NVLink reaches its rate times (all rows / rows that leave the rank)."""
    world = small_world("even", num_tokens=4000, hidden=4096, num_experts=4, num_topk=4)  # to all ranks
    _, timeline = deepep(world, stages="dispatch", comm_sms=24)
    assert bottleneck_gbps(world, "dispatch", timeline.makespan_ns) == pytest.approx(370 * 4 / 3, rel=0.05)
