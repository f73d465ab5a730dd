"""MegaMoE's schedule: all rows once, pulled in order beside the products, in waves, between two barriers."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from policy_worlds import kind_nodes, make_graph, odd_worlds, on_few_sms, run_both, small_world

from sim.engine.kinds import BARRIER, COMBINE, DISPATCH, GEMM0, GEMM1, SEND
from sim.policies import make_knobs
from sim.policies.megamoe import Knobs, multiplied_rows, tile_columns, tile_height

WORLDS = odd_worlds()

graph_of = partial(make_graph, "megamoe")


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS.keys())
def test_barriers_come_before_the_pulls_and_before_the_reduction(world):
    graph = graph_of(world, gate=False)
    timeline = run_both(graph)
    first, second = kind_nodes(graph, BARRIER)
    pulls, sums, sends = (kind_nodes(graph, kind) for kind in (DISPATCH, COMBINE, SEND))
    assert (timeline.start_ns[pulls] >= timeline.done_ns[first]).all()
    assert (timeline.start_ns[sums] >= timeline.done_ns[second]).all()
    assert (timeline.done_ns[sends] <= timeline.start_ns[second]).all()
    assert timeline.makespan_ns == timeline.done_ns[sums].max()


def test_rows_are_pulled_in_the_order_of_experts_and_blocks():
    world = on_few_sms(small_world("uniform", num_tokens=300, num_experts=12), 3)
    graph = graph_of(world, tile_m=32)
    timeline = run_both(graph)
    for rank in range(world.num_ranks):
        pulls = np.flatnonzero((graph.nodes["kind"] == DISPATCH) & (graph.nodes["peer"] == rank))
        order = np.lexsort((graph.nodes["m"][pulls], graph.nodes["expert"][pulls]))
        assert (np.diff(timeline.start_ns[pulls][order]) >= 0).all()


def test_owners_do_not_all_pull_from_the_same_source():
    world = small_world("even", num_tokens=256, num_experts=4)
    graph = graph_of(world, tile_m=16)
    pulls = kind_nodes(graph, DISPATCH)
    first = pulls[(graph.nodes["expert"][pulls] == 0) & (graph.nodes["m"][pulls] == 0)]
    assert (graph.nodes["rank"][first] == graph.nodes["peer"][first]).all()  # the own rows come first


def test_pulls_run_beside_products():
    world = on_few_sms(small_world("even", num_tokens=2048), 2)
    graph = graph_of(world, pull_rows=1)
    timeline = run_both(graph)
    pulls, products = kind_nodes(graph, DISPATCH), kind_nodes(graph, GEMM0)
    assert timeline.start_ns[products].min() < timeline.start_ns[pulls].max()
    server = graph.nodes["server"]
    assert not set(server[pulls]) & set(server[products])
    assert {graph.servers[index].slots for index in set(server[pulls])} == {2}


def test_products_wait_for_the_rows_of_their_block():
    world = small_world("zipf:1.2")
    graph = graph_of(world, tile_m=16)
    for node in kind_nodes(graph, GEMM0):
        before = graph.predecessors(node)
        assert (graph.nodes["kind"][before] == DISPATCH).all()
        for field in ("expert", "m"):
            assert (graph.nodes[field][before] == graph.nodes[field][node]).all()
        assert (graph.nodes["peer"][before] == graph.nodes["rank"][node]).all()
    for node in kind_nodes(graph, GEMM1):
        [hidden] = graph.predecessors(node)
        for field in ("rank", "expert", "m"):
            assert graph.nodes[field][hidden] == graph.nodes[field][node]


def on_blackwell(world):
    """The same world, where the GPUs have fp4 too: by that the policy knows a Blackwell."""
    hardware = world.hardware
    tflops = {**hardware.tflops, "fp4": 4000.0}
    sources = {**hardware.sources, "tflops.fp4": "made up"}
    return replace(world, hardware=replace(hardware, tflops=tflops, sources=sources))


def test_products_go_in_waves_of_experts():
    world = on_few_sms(small_world("even", num_tokens=256, num_experts=16), 1)
    graph = graph_of(world, experts_per_wave=2)
    timeline = run_both(graph)
    for rank in range(world.num_ranks):
        starts = []
        for wave in range(2):
            for kind in (GEMM0, GEMM1):
                nodes = kind_nodes(graph, kind, rank)
                starts.append(timeline.start_ns[nodes[graph.nodes["expert"][nodes] // 2 == wave]])
        assert all(len(part) for part in starts)
        # a GPU of one slot has all rows long before it needs them, except at the very beginning
        for earlier, later in pairwise(starts[1:]):
            assert earlier.max() < later.min()


@pytest.mark.parametrize(("tokens", "per_wave"), [(1, 8), (64, 8), (2048, 8), (4096, 4), (8192, 2)])
def test_waves_fill_the_gpu_twice(tokens, per_wave):
    world = on_blackwell(small_world("even", num_tokens=tokens, num_experts=32, ffn=512, hidden=256, num_topk=4))
    graph = graph_of(world)
    for kind, second in ((GEMM0, 0), (GEMM1, 1)):
        nodes = kind_nodes(graph, kind)
        wave = graph.nodes["expert"][nodes] // per_wave
        np.testing.assert_array_equal(graph.nodes["priority"][nodes], 2 * wave + second)


def test_the_second_kernel_waits_for_the_first():
    world = small_world("uniform", num_tokens=700)
    for split in (True, False):
        graph = graph_of(world, split=split)
        timeline = run_both(graph)
        for rank in range(world.num_ranks):
            first = timeline.done_ns[kind_nodes(graph, GEMM0, rank)].max()
            second = timeline.start_ns[kind_nodes(graph, GEMM1, rank)].min()
            assert (second >= first + world.hardware.graph_launch_ns) == split


def test_idle_experts_read_no_weights():
    world = small_world("uniform", num_tokens=1, num_experts=64)
    graph = graph_of(world)
    active = np.count_nonzero(world.routing.counts.sum(axis=0))
    assert active < 64
    assert len(kind_nodes(graph, GEMM0)) == len(kind_nodes(graph, GEMM1)) == active


@pytest.mark.parametrize(
    ("tokens", "fused"),
    [(8, 16), (34, 16), (35, 32), (66, 32), (67, 64), (130, 64), (131, 96), (258, 96), (259, 128), (387, 192)],
)
def test_tile_heights_follow_the_expected_rows(tokens, fused):
    hopper = small_world("even", num_tokens=tokens, num_experts=32, num_topk=2)  # tokens / 4 rows per expert
    world = on_blackwell(hopper)
    assert tile_height(hopper, Knobs()) == (128 if tokens >= 256 else 64)
    assert tile_height(world, Knobs()) == fused
    assert tile_height(world, Knobs(split=True)) == 64
    assert tile_height(world, Knobs(tile_m=48)) == 48
    graph = graph_of(world)
    products = kind_nodes(graph, GEMM0)
    rows = world.routing.counts.sum(axis=0)
    assert len(products) == (-(-rows // fused)).sum()


@pytest.mark.parametrize(
    ("tokens", "ffn", "columns"),
    [
        (48, 80, (128, 128)),  # 12 rows per expert
        (52, 80, (256, 256)),
        (32, 2560, (128, 128)),  # 8 rows
        (36, 2560, (512, 256)),
        (36, 2559, (128, 128)),
    ],
)
def test_tile_columns_follow_the_expected_rows_and_the_ffn(tokens, ffn, columns):
    world = small_world("even", num_tokens=tokens, num_experts=32, ffn=ffn)
    assert tile_columns(world, Knobs(split=True)) == columns
    assert tile_columns(on_blackwell(world), Knobs()) == (128, 128)
    assert tile_columns(world, Knobs(split=True, tile_n=64)) == (64, 64)


@pytest.mark.parametrize(
    ("tokens", "ffn", "columns"),
    [
        (255, 80, 128),  # just below 64 rows per expert
        (256, 80, 256),
        (1, 3072, 256),  # a quarter of a row
        (1, 3071, 128),
    ],
)
def test_columns_of_hoppers_fused_tiles(tokens, ffn, columns):
    world = small_world("even", num_tokens=tokens, num_experts=32, ffn=ffn)
    assert tile_columns(world, Knobs()) == (columns, columns)
    fewer = small_world("even", num_tokens=tokens, num_experts=64, ffn=ffn)
    assert tile_columns(fewer, Knobs()) == (128, 128)  # 32 rows, or an eighth of a row


@pytest.mark.parametrize(
    ("rows", "swapped", "blackwell"),
    [(1, 8, 16), (8, 8, 16), (9, 16, 16), (16, 16, 16), (17, 32, 32), (33, 64, 48), (49, 64, 64), (64, 64, 64)],
)
def test_few_rows_are_multiplied_with_little_padding(rows, swapped, blackwell):
    hopper = small_world("even", num_tokens=128)
    real = np.array([rows, 64])
    assert multiplied_rows(hopper, real, 64, Knobs()).tolist() == [swapped, 64]
    assert multiplied_rows(on_blackwell(hopper), real, 64, Knobs()).tolist() == [blackwell, 64]
    assert multiplied_rows(hopper, real, 64, Knobs(pad=True)).tolist() == [64, 64]
    assert multiplied_rows(hopper, real, 64, Knobs(tile_m=64)).tolist() == [64, 64]
    assert multiplied_rows(hopper, real, 64, Knobs(tile_m=64, pad=False)).tolist() == [swapped, 64]
    assert multiplied_rows(hopper, real, 128, Knobs()).tolist() == [128, 128]
    more = small_world("even", num_tokens=129)
    assert multiplied_rows(more, real, 64, Knobs()).tolist() == [64, 64]


def test_padding_that_is_not_multiplied_takes_no_operations():
    world = small_world("zipf:1.2", num_tokens=61, num_experts=32)
    graph = graph_of(world)
    products = kind_nodes(graph, GEMM0)
    padded = graph_of(world, pad=True)
    assert (graph.nodes["flops"][products] <= padded.nodes["flops"][products]).all()
    assert graph.nodes["flops"][products].sum() < padded.nodes["flops"][products].sum()
    np.testing.assert_array_equal(graph.nodes["useful_flops"], padded.nodes["useful_flops"])


@pytest.mark.parametrize(("tokens", "waves"), [(3, 1), (4, 4), (16, 4), (17, 1), (300, 1)])
def test_hoppers_kernel_has_one_wave_but_for_a_few_rows(tokens, waves):
    """Tokens / 4 are the rows per expert; two of the 8 local experts fill two multiprocessors twice."""
    world = on_few_sms(small_world("even", num_tokens=tokens, num_experts=32), 2)
    graph = graph_of(world)
    assert len(set(graph.nodes["priority"][kind_nodes(graph, GEMM0)])) == waves


def test_two_multiprocessors_share_rows_on_blackwell_alone():
    world = small_world("even", num_tokens=8192, num_experts=4, hidden=2048, ffn=64, num_topk=1)
    for slow in (world, on_blackwell(world)):
        slow = replace(slow, hardware=replace(slow.hardware, l2_gbps=100.0))
        chosen, alone, pair = (graph_of(slow, **knobs) for knobs in ({}, {"cluster": 1}, {"cluster": 2}))
        times = [int(graph.nodes["duration_ns"][kind_nodes(graph, GEMM0)[0]]) for graph in (chosen, alone, pair)]
        assert times[0] == times[1 if slow.hardware.tflops.get("fp4") is None else 2] and times[1] != times[2]


def test_a_cluster_reads_its_rows_once():
    world = small_world("even", num_tokens=8192, num_experts=4, hidden=2048, ffn=64, num_topk=1)
    world = replace(world, hardware=replace(world.hardware, l2_gbps=100.0))
    alone, pair = (graph_of(world, cluster=cluster) for cluster in (1, 2))
    product = kind_nodes(alone, GEMM0)[0]
    assert alone.nodes["duration_ns"][product] > pair.nodes["duration_ns"][product]


@pytest.mark.parametrize("name", ["tile_m", "tile_n", "cluster", "experts_per_wave", "pull_rows"])
def test_wrong_knobs_are_errors(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make_knobs("megamoe", {name: 0})
    with pytest.raises(ValueError, match="policy megamoe has the knobs"):
        make_knobs("megamoe", {"tiles": 1})
