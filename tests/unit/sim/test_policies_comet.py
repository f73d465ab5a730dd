"""COMET's schedule: tokens gathered once, tiles in the order of arrival and then by column blocks, and its knobs."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_worlds import assert_computed_once, carried_bytes, kind_nodes, make_graph, odd_worlds, run_both, small_world

from sim.drafting.blocks import blocks_per_expert
from sim.engine.kinds import BARRIER, COMBINE, ELEMENTWISE, GATE, GEMM0, GEMM1, LAUNCH, SEND
from sim.policies import make_knobs
from sim.policies.comet import fetch_order

WORLDS = odd_worlds()

graph_of = partial(make_graph, "comet")


def token_pairs(world, group=1):
    """`[num_ranks, num_ranks]`: tokens of each source that some expert on each rank needs, by walking over them.

    With `group`, an expert lives on all ranks of its owner's group.
    """
    pairs = np.zeros((world.num_ranks, world.num_ranks), np.int64)
    for source, tokens in enumerate(world.routing.topk_idx.tolist()):
        for choices in tokens:
            groups = {int(world.routing.owner[expert]) // group for expert in choices if expert >= 0}
            for rank in range(world.num_ranks):
                pairs[source, rank] += rank // group in groups
    return pairs


def demanded_bytes(world, group=1, gather="all", layer1=True):
    """Bytes out of and into each rank: tokens to every rank (that needs them), and one sum per token and rank back."""
    pairs = token_pairs(world, group)
    fetched = np.full_like(pairs, world.routing.num_tokens) if gather == "all" else pairs.copy()
    np.fill_diagonal(fetched, 0)
    np.fill_diagonal(pairs, 0)
    size = world.config.hidden
    moved = fetched * size * world.precision.token_bytes + layer1 * pairs.T * size * world.precision.result_bytes
    return np.array([moved.sum(axis=1), moved.sum(axis=0)])


def assert_moved(graph, timeline, world, **how):
    demand, moved = demanded_bytes(world, **how), carried_bytes(graph, timeline, world.num_ranks)
    assert (moved >= demand).all() and (moved <= demand + graph.num_tasks).all()  # a task's bytes are rounded up


@pytest.mark.parametrize("gather", ["all", "routed"])
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_every_row_is_computed_and_every_token_moved_once(world, gather):
    graph = graph_of(world, gather=gather, tile_m=16, tile_n=64)
    timeline = run_both(graph)
    assert_computed_once(graph, world)
    assert_moved(graph, timeline, world, gather=gather)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["uniform", "zipf:1.2", "top-1", "silent rank", "ranks that get nothing"])
def test_tensor_parallel_ranks_share_the_columns_of_all_rows_of_their_group(name, size):
    world = WORLDS[name]
    graph = graph_of(world, tensor_parallel=size, gather="routed", tile_m=16)
    timeline = run_both(graph)
    assert_computed_once(graph, world)
    assert_moved(graph, timeline, world, group=size, gather="routed")
    work = graph.nodes["useful_flops"] * graph.nodes["count"] * (graph.nodes["kind"] == GEMM0)
    by_rank = np.bincount(graph.nodes["rank"], work, world.num_ranks).reshape(-1, size)
    np.testing.assert_allclose(by_rank, by_rank[:, :1].repeat(size, axis=1))


def test_one_rank_after_the_other_is_fetched_the_next_first():
    world = small_world()
    graph = graph_of(world, stages="layer0")
    timeline = run_both(graph)
    for rank in range(world.num_ranks):
        copies = np.flatnonzero((graph.nodes["kind"] == SEND) & (graph.nodes["peer"] == rank))
        in_time = copies[np.argsort(timeline.start_ns[copies])]
        assert graph.nodes["rank"][in_time].tolist() == [(rank + turn) % 4 for turn in (1, 2, 3)]
        assert (timeline.start_ns[in_time][1:] >= timeline.done_ns[in_time][:-1]).all()


@given(
    counts=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4),
    random=st.randoms(use_true_random=False),
)
def test_packing_keeps_the_order_of_the_sources(counts, random):
    counts = np.array(counts)
    orders = np.array([random.sample(range(len(counts)), len(counts)) for _ in range(3)])
    blocks = blocks_per_expert(counts, 4, orders.T)
    for expert, order in enumerate(orders.tolist()):
        rows = [source for source in order for _ in range(counts[source, expert])]
        for source in order:  # the pieces of a packet follow each other
            first, number = blocks.piece_start[source, expert], counts[source, expert]
            if number:
                begin = rows.index(source)
                assert blocks.row_offset[source, expert] == begin % 4
                assert blocks.m[blocks.piece_block[first]] == begin // 4
                assert blocks.piece_source[first] == source
        found = [
            (int(blocks.m[block]), int(source))
            for block, source, number in zip(blocks.piece_block, blocks.piece_source, blocks.piece_rows, strict=True)
            if blocks.expert[block] == expert
            for _ in range(number)
        ]
        assert sorted(found) == sorted((row // 4, int(source)) for row, source in enumerate(rows))


def test_between_nodes_one_rank_fetches_for_its_node():
    world = small_world(num_ranks=6, num_experts=6, hardware="2x3xH100")
    graph = graph_of(world, stages="layer0")
    timeline = run_both(graph)
    size = world.routing.num_tokens * world.config.hidden * world.precision.token_bytes
    carried = {link[:2]: nbytes for link, nbytes in zip(graph.links, timeline.link_bytes, strict=True)}
    for rank in range(6):
        place, node = rank % 3, rank // 3 * 3
        other = (node + 3) % 6
        assert carried["NIC in", rank] == size
        assert carried["NVLink in", rank] == 4 * size
        order = fetch_order(world)[:, rank]
        assert order.tolist() == [first + (place + turn) % 3 for first in (node, other) for turn in range(3)]
        copies = kind_nodes(graph, SEND)
        copies = copies[graph.nodes["peer"][copies] == rank]
        fetched = {int(m): int(node) for m, node in zip(graph.nodes["m"][copies], copies, strict=True)}
        assert [graph.nodes["rank"][fetched[turn]] for turn in (1, 2, 4, 5)] == [*order[1:3], *order[1:3]]
        assert graph.nodes["rank"][fetched[3]] == other + place
        for turn in (4, 5):  # from the peer that fetched them, when it has them
            first_hop = graph.nodes["rank"][graph.predecessors(fetched[turn])] // 3 != node // 3
            assert first_hop.sum() == 1


@pytest.mark.parametrize("nvlink_gbps", [0.5, 1000.0])  # slots wait for rows, or rows for slots
def test_tiles_wait_for_their_last_source_and_go_in_the_order_of_arrival(nvlink_gbps):
    world = small_world("uniform", num_tokens=300)
    world = replace(world, hardware=replace(world.hardware, sms=32, nvlink_gbps=nvlink_gbps))
    graph = graph_of(world, stages="layer0", tile_m=16)
    timeline = run_both(graph)
    owner, counts = world.routing.owner, world.routing.counts
    copy_of = {(int(graph.nodes["rank"][i]), int(graph.nodes["peer"][i])): i for i in kind_nodes(graph, SEND)}
    for rank in range(world.num_ranks):
        mine = np.flatnonzero(owner == rank)
        turns, starts = [], []
        for node in kind_nodes(graph, GEMM0, rank):
            expert = mine[graph.nodes["expert"][node]]
            sources = [(rank + turn) % 4 for turn in range(4)]
            rows = [source for source in sources for _ in range(counts[source, expert])]
            m = graph.nodes["m"][node]
            needed = set(rows[m * 16 : m * 16 + 16])
            found = {int(graph.nodes["rank"][i]) for i in graph.predecessors(node) if graph.nodes["kind"][i] == SEND}
            assert found == needed - {rank}
            assert all(timeline.start_ns[node] >= timeline.done_ns[copy_of[s, rank]] for s in found)
            turns.append(max((source - rank) % 4 for source in needed))
            assert graph.nodes["priority"][node] == turns[-1]
            starts.append(timeline.start_ns[node])
        assert sorted(turns) == [turn for _, turn in sorted(zip(starts, turns, strict=True))]
        assert set(turns) == {0, 1, 2, 3}


def test_the_host_reads_the_counts_before_it_launches_the_products():
    world = small_world()
    world = replace(world, hardware=replace(world.hardware, host_sync_ns=12_345))  # unlike all other times of hosts
    graph = graph_of(world, stages="layer0")
    timeline = run_both(graph)
    launches = kind_nodes(graph, LAUNCH)
    reads = launches[graph.nodes["duration_ns"][launches] == world.hardware.host_sync_ns]
    assert len(reads) == world.num_ranks
    for rank in range(world.num_ranks):
        read = reads[graph.nodes["rank"][reads] == rank]
        started = timeline.start_ns[kind_nodes(graph, GEMM0, rank)].min()
        assert started >= timeline.done_ns[read].max() + world.hardware.launch_ns


def test_a_barrier_and_the_activation_part_the_layers():
    world = small_world("zipf:1.2")
    graph = graph_of(world)
    timeline = run_both(graph)
    ready, parted = kind_nodes(graph, BARRIER)
    first, second, active = (kind_nodes(graph, kind) for kind in (GEMM0, GEMM1, ELEMENTWISE))
    copies = kind_nodes(graph, SEND)
    assert (timeline.start_ns[copies] >= timeline.done_ns[ready]).all()
    assert (timeline.done_ns[first] <= timeline.start_ns[parted]).all()
    assert (timeline.start_ns[active] >= timeline.done_ns[parted]).all() and len(active) == world.num_ranks
    for rank in range(world.num_ranks):
        begun = timeline.start_ns[second[graph.nodes["rank"][second] == rank]]
        assert (begun >= timeline.done_ns[active[graph.nodes["rank"][active] == rank]]).all()


def layer1(graph, kind, column, rank):
    """Nodes of a column block of layer 1."""
    nodes = kind_nodes(graph, kind, rank)
    if kind == GEMM1:
        return nodes[graph.nodes["priority"][nodes] == column]
    on_server = graph.nodes["server"][nodes] >= 0  # copies of layer 0 have none
    return nodes[on_server & (graph.nodes["m"][nodes] == column)]


def test_a_column_block_goes_back_when_its_tiles_are_done_while_the_next_one_is_computed():
    world = small_world("uniform", num_tokens=2000, hidden=1024, ffn=512)
    graph = graph_of(world, num_comm_blocks=100, column_blocks=4)
    timeline = run_both(graph)
    for rank in range(world.num_ranks):
        for column in range(4):
            tiles, sends = layer1(graph, GEMM1, column, rank), layer1(graph, SEND, column, rank)
            assert len(tiles) and len(sends) == world.num_ranks
            assert (timeline.start_ns[sends] >= timeline.done_ns[tiles].max()).all()
            if column:
                before = layer1(graph, GEMM1, column - 1, rank)
                assert timeline.start_ns[before].max() <= timeline.start_ns[tiles].min()
        assert timeline.start_ns[layer1(graph, SEND, 0, rank)].min() < timeline.done_ns[tiles].max()


def test_sums_wait_for_all_ranks_that_had_rows():
    world = small_world("uniform")
    graph = graph_of(world, tile_n=64, column_blocks=3)
    timeline = run_both(graph)
    pairs = token_pairs(world)
    for rank in range(world.num_ranks):
        for column in range(3):
            [total] = layer1(graph, COMBINE, column, rank)
            before = graph.predecessors(total)
            sends = before[graph.nodes["kind"][before] == SEND]
            assert sorted(graph.nodes["rank"][sends]) == np.flatnonzero(pairs[rank]).tolist()
            assert (graph.nodes["m"][sends] == column).all() and (graph.nodes["peer"][sends] == rank).all()
            assert timeline.start_ns[total] >= timeline.done_ns[sends].max()


@pytest.mark.parametrize(("column_blocks", "tiles"), [(1, [3]), (2, [1, 2]), (3, [1, 1, 1]), (9, [1, 1, 1])])
def test_column_blocks(column_blocks, tiles):
    world = small_world(hidden=192)
    graph = graph_of(world, tile_n=64, column_blocks=column_blocks)
    for column, count in enumerate(tiles):
        assert set(graph.nodes["count"][layer1(graph, GEMM1, column, 0)]) == {count}
    assert_computed_once(graph, world)


def test_communication_blocks_take_the_place_of_computing_ones():
    world = small_world()
    graph = graph_of(world, num_comm_blocks=30)
    servers = [graph.servers[graph.nodes["server"][kind_nodes(graph, kind, 1)[-1]]] for kind in (GEMM1, COMBINE)]
    assert [server.slots for server in servers] == [world.hardware.sms - 30, 30]
    tall = small_world("even", num_tokens=8192, hidden=1024, ffn=1024)
    few, many = (run_both(graph_of(tall, num_comm_blocks=blocks)).makespan_ns for blocks in (10, 120))
    assert many > few  # twelve blocks left to compute


def test_layer0_ends_at_the_barrier_without_a_gate():
    world = small_world()
    graph = graph_of(world, stages="layer0")
    for kind in (GATE, ELEMENTWISE, GEMM1, COMBINE):
        assert not len(kind_nodes(graph, kind))
    timeline = run_both(graph)
    assert timeline.makespan_ns == timeline.done_ns[kind_nodes(graph, BARRIER)[-1]]
    assert_moved(graph, timeline, world, layer1=False)


def test_a_layer_on_eight_ranks_has_as_many_kernels_and_copies_as_were_counted():
    world = small_world(num_ranks=8)
    launches = kind_nodes(graph_of(world), LAUNCH, 0)
    assert len(launches) == 33 - 7 + 1 + 1  # seven copies are issued at once, and the host reads the counts
    layer0 = kind_nodes(graph_of(world, stages="layer0"), LAUNCH, 0)
    assert len(layer0) == 1 + 1 + 3 + 1 + 1 + 1  # own rows, copies, indices, sort, reading, product
    assert len(kind_nodes(graph_of(world, num_ops=40), LAUNCH, 0)) == len(launches) + 7
    assert len(kind_nodes(graph_of(world, num_ops=1), LAUNCH, 0)) == len(launches) - 17


# ---- Ampere


def on_ampere(routing="uniform", **sizes):
    return small_world(routing, hardware="4xA100", **({"num_tokens": 300, "hidden": 2048} | sizes))


def test_sums_of_all_tokens_go_round_a_ring():
    world = on_ampere()
    graph = graph_of(world)
    timeline = run_both(graph)
    token_bytes = world.routing.num_tokens * world.config.hidden * 2
    assert (carried_bytes(graph, timeline, 4) == 2 * 3 * token_bytes).all()  # gathered, and round the ring
    comm = next(index for index, server in enumerate(graph.servers) if server.name == "communication blocks")
    assert graph.servers[comm].slots == 3
    sends = kind_nodes(graph, SEND)
    ring = sends[graph.nodes["server"][sends] >= 0]
    assert len(ring) == 2 * 3 * 4  # splits of 1,024 columns, stages, ranks
    assert (graph.nodes["peer"][ring] == (graph.nodes["rank"][ring] - 1) % 4).all()
    assert set(graph.nodes["count"][ring]) == {3}  # tiles of 128 tokens
    sums = kind_nodes(graph, COMBINE)
    assert len(sums) == 2 * 4 and timeline.makespan_ns == timeline.done_ns[sums].max()


def test_a_rank_adds_to_what_the_next_one_has_added_up():
    world = on_ampere(hidden=1024)
    graph = graph_of(world)
    for last in kind_nodes(graph, COMBINE):
        node, rank = last, int(graph.nodes["rank"][last])
        for step in range(1, 4):
            before = [n for n in graph.predecessors(node) if graph.nodes["kind"][n] == SEND]
            assert len(before) == 1
            node = before[0]
            assert graph.nodes["rank"][node] == (rank + step) % 4
        assert not any(graph.nodes["kind"][n] == SEND for n in graph.predecessors(node))


def test_a_block_waits_for_each_result_that_it_reads_and_for_the_sum_so_far():
    world = on_ampere("to-rank-0", hidden=1024, num_tokens=100)
    graph = graph_of(world, read_ns=1000)
    store_ns = 100 * 1024 * 2 / world.hardware.sm_write_gbps
    rows = np.count_nonzero(world.routing.topk_idx >= 0, axis=(1, 2)) / 100  # of a token of each source, all on rank 0
    ring = np.concatenate([kind_nodes(graph, kind) for kind in (SEND, COMBINE)])
    ring = ring[graph.nodes["server"][ring] >= 0]
    for rank in range(4):
        mine = ring[graph.nodes["rank"][ring] == rank]
        stages = mine[np.argsort(graph.nodes["priority"][mine])]
        reads = 1 + (np.roll(rows, -1 - rank) if rank == 0 else np.zeros(4))  # the next rank's tokens come first
        assert graph.nodes["duration_ns"][stages] == pytest.approx(17 * reads * 1000 + store_ns, abs=1)  # 6 at a time


@pytest.mark.parametrize(("hidden", "splits"), [(192, 1), (1024, 1), (2048, 2), (3072, 3), (4096, 4), (8192, 4)])
def test_splits_of_columns_are_whole_tiles_of_the_ring(hidden, splits):
    sums = kind_nodes(graph_of(on_ampere(hidden=hidden, num_tokens=16)), COMBINE)
    assert len(sums) == splits * 4


def test_what_is_not_set_is_the_systems_on_that_gpu():
    for world, tile_n, blocks in ((small_world(), 256, 26), (on_ampere(), 128, 3)):
        knobs = make_knobs("comet", {}).in_world(world)
        assert (knobs.tile_n, knobs.num_comm_blocks) == (tile_n, blocks)
        knobs = make_knobs("comet", {"tile_n": 64, "num_comm_blocks": 5}).in_world(world)
        assert (knobs.tile_n, knobs.num_comm_blocks) == (64, 5)


@pytest.mark.parametrize("routing", ["even", "zipf:1.2", "to-rank-0"])
def test_on_ampere_every_row_is_computed_once(routing):
    world = on_ampere(routing, num_tokens=67)
    graph = graph_of(world)
    run_both(graph)
    assert_computed_once(graph, world)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"tensor_parallel": 3}, "tensor_parallel must divide num_ranks=4, got 3"),
        ({"num_comm_blocks": 132}, "num_comm_blocks must be less than the 132 SMs of a GPU, got 132"),
        ({"stages": "layer1"}, "stages must be one of layer, layer0; got 'layer1'"),
        ({"gather": "some"}, "gather must be one of all, routed; got 'some'"),
        ({"tile_m": 0}, "tile_m must be at least 1, got 0"),
        ({"column_blocks": 0}, "column_blocks must be at least 1, got 0"),
        ({"blocks": 1}, "policy comet has the knobs"),
    ],
)
def test_wrong_values_are_errors(knobs, message):
    with pytest.raises(ValueError, match=message):
        graph_of(small_world(), **knobs)


def test_columns_that_cannot_be_shared_are_an_error():
    with pytest.raises(ValueError, match="tensor_parallel must divide ffn=81, got 2"):
        graph_of(small_world(ffn=81), tensor_parallel=2)
