"""SonicMoE: kernels in order, tiles whose stages hide behind each other's, no row moved within a GPU."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from policy_worlds import assert_computed_once, assert_link_bytes, kind_nodes, odd_worlds, run_policy, small_world

from sim.engine.kinds import COMBINE, EPILOGUE, GATE, GEMM0, GEMM1, LAUNCH, LOAD, PERMUTE
from sim.policies import make_knobs
from sim.world.rounding import round_tokens

sonic = partial(run_policy, "sonic")


@pytest.mark.parametrize("name", odd_worlds())
def test_kernels_run_one_after_the_other(name):
    world = odd_worlds()[name]
    graph, timeline = sonic(world, tile_m=16)
    begin, end = timeline.start_ns, timeline.done_ns
    for rank in range(world.num_ranks):
        gate, combine = kind_nodes(graph, GATE, rank), kind_nodes(graph, COMBINE, rank)
        up, down = kind_nodes(graph, GEMM0, rank), kind_nodes(graph, GEMM1, rank)
        loads, ends = kind_nodes(graph, LOAD, rank), kind_nodes(graph, EPILOGUE, rank)
        assert len(up) == len(down) == len(loads) / 2 == len(ends) / 2
        assert end[gate].max() <= begin[combine].min()
        if len(up):
            of_up, of_down = np.split(np.sort(ends), 2)
            first_loads, second_loads = np.split(np.sort(loads), 2)
            assert end[gate].max() <= begin[first_loads].min()
            assert (end[first_loads] <= begin[up]).all() and (end[up] <= begin[of_up]).all()
            assert end[of_up].max() <= begin[second_loads].min()
            assert (end[second_loads] <= begin[down]).all() and (end[down] <= begin[of_down]).all()
            assert end[of_down].max() <= begin[combine].min()
    assert len(kind_nodes(graph, PERMUTE)) == 0
    kernels = 4 if world.num_ranks == 1 else 6
    assert len(kind_nodes(graph, LAUNCH)) == kernels * world.num_ranks


@pytest.mark.parametrize("ping_pong", [True, False])
def test_a_long_stage_takes_the_longest_of_its_parts_or_their_sum(ping_pong):
    world = small_world("even", num_ranks=1, num_tokens=128 * 264, num_experts=4, num_topk=2, ffn=256, hidden=512)
    graph, timeline = sonic(world, ping_pong=ping_pong, tile_n=128)
    nodes, sms = graph.nodes, world.hardware.sms
    up, loads, ends = (kind_nodes(graph, kind) for kind in (GEMM0, LOAD, EPILOGUE))
    loads, ends = loads[: len(up)], ends[: len(up)]
    parts = [(nodes["duration_ns"] * nodes["count"])[kind].sum() / sms for kind in (loads, up, ends)]
    span = timeline.done_ns[ends].max() - timeline.start_ns[loads].min()
    expected = max(parts) if ping_pong else sum(parts)
    assert min(parts) > 0.1 * sum(parts)  # otherwise the two are the same
    assert expected <= span <= 1.1 * expected


def test_epilogues_write_each_row_once_at_the_speed_of_the_memory():
    world = small_world(num_tokens=3000)
    nodes = sonic(world)[0].nodes
    ends, hardware = kind_nodes(sonic(world)[0], EPILOGUE), world.hardware
    written = (
        (nodes["duration_ns"] * nodes["count"])[ends].sum() / hardware.sms * hardware.hbm_gbps * hardware.hbm_achieved
    )
    expected = 4 * 3000 * 2 * (192 + 80) * 2  # rows, hidden and ffn, bfloat16
    np.testing.assert_allclose(written, expected, rtol=0.01)


def test_training_writes_more():
    world = small_world()
    plain, saving = sonic(world)[0], sonic(world, save_up=True)[0]
    ends = kind_nodes(plain, EPILOGUE)
    up, down = np.split(ends, 2)
    more = saving.nodes["duration_ns"] / np.maximum(plain.nodes["duration_ns"], 1)
    np.testing.assert_allclose(more[up], 3, rtol=0.05)  # ffn columns, and 2 ffn of a gated expert beside them
    assert (more[down] == 1).all()


def test_rounded_tokens_leave_no_padding():
    world = small_world(num_tokens=300)
    padded = sonic(world)[0].nodes
    assert (padded["flops"] > padded["useful_flops"]).any()
    rounded = replace(world, routing=round_tokens(world.routing, 128))
    graph, timeline = sonic(rounded)
    products = np.isin(graph.nodes["kind"], (GEMM0, GEMM1))
    np.testing.assert_array_equal(graph.nodes["flops"][products], graph.nodes["useful_flops"][products])
    assert_computed_once(graph, rounded)
    assert_link_bytes(graph, timeline, rounded)


@pytest.mark.parametrize(("knob", "value"), [("tile_m", 0), ("tile_n", -1), ("rate", 1.5), ("pingpong", True)])
def test_wrong_values_are_errors(knob, value):
    with pytest.raises(ValueError, match=knob):
        make_knobs("sonic", {knob: value})
