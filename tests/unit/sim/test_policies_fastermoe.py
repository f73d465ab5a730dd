"""FasterMoE and Tutel: steps that overlap in the stated order, shadows that pay, and everything computed once."""

from functools import partial

import numpy as np
import pytest
from policy_worlds import COUNT_BYTES, assert_computed_once, kind_nodes, run_policy, small_world

from sim.drafting.shadow import choose_shadows, predicted_ns, shadowed
from sim.engine.kinds import COMBINE, GEMM0, GEMM1, SEND

fastermoe = partial(run_policy, "fastermoe")


def steps_of(graph, timeline, rank, size):
    """(sends in, products, sends back) of each step of a rank, for groups of `size` and every pair busy."""
    nodes, ranks = graph.nodes, int(graph.nodes["rank"].max()) + 1
    groups = ranks // size
    mine = kind_nodes(graph, SEND)[ranks * ranks :]  # without the counts
    there, back = np.split(mine, 2)
    distance = lambda nodes_: (nodes["peer"][nodes_] // size - nodes["rank"][nodes_] // size) % groups  # noqa: E731
    sent = [there[(distance(there) == step) & (nodes["peer"][there] == rank)] for step in range(groups)]
    back_by = (-distance(back)) % groups
    returned = [back[(back_by == step) & (nodes["rank"][back] == rank)] for step in range(groups)]
    products = np.array_split(kind_nodes(graph, GEMM0, rank), groups)
    second = np.array_split(kind_nodes(graph, GEMM1, rank), groups)
    return sent, products, second, returned


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_waits_for_its_rows_only(size):
    """C_j begins after S_j, and somewhere before the last S: there is overlap; R_j begins after C_j."""
    world = small_world("even", num_tokens=4096, hidden=1024, ffn=512, num_experts=4)  # equal row blocks in all steps
    graph, timeline = fastermoe(world, group_size=size)
    for rank in range(world.num_ranks):
        sent, products, second, returned = steps_of(graph, timeline, rank, size)
        assert all(len(step) for step in [*sent, *products, *second, *returned])
        for step in range(len(sent)):
            assert timeline.done_ns[sent[step]].max() <= timeline.start_ns[products[step]].min()
            assert timeline.done_ns[second[step]].max() <= timeline.start_ns[returned[step]].min()
        for earlier, later in zip([*sent, *returned], [*sent[1:], *returned], strict=False):
            assert timeline.done_ns[earlier].max() <= timeline.start_ns[later].min() + world.hardware.nvlink_latency_ns
        assert timeline.start_ns[products[0]].min() < timeline.done_ns[sent[-1]].max()


@pytest.mark.parametrize("knobs", [{"group_size": 1}, {"cut": "rows"}])
def test_a_send_is_a_matter_of_both_sides(knobs):
    """It waits for both ranks to come to it, both wait for it, and it costs a floor for each expert's call."""
    world = small_world()
    graph, _ = fastermoe(world, **knobs)
    calls = 1 if "cut" in knobs else 2
    for send in kind_nodes(graph, SEND)[16:]:
        both = {int(graph.nodes[side][send]) for side in ("rank", "peer")}
        assert set(graph.nodes["rank"][graph.predecessors(send)].tolist()) == both
        assert set(graph.nodes["rank"][graph.successors(send)].tolist()) == both
        assert graph.nodes["duration_ns"][send] == calls * 9000


@pytest.mark.parametrize("knobs", [{}, {"shadow": True}])
def test_tokens_are_summed_when_all_is_back(knobs):
    world = small_world("hot", num_tokens=3000, hidden=512, ffn=2048)
    graph, timeline = fastermoe(world, **knobs)
    for rank in range(world.num_ranks):
        start = timeline.start_ns[kind_nodes(graph, COMBINE, rank)].min()
        back = [send for send in kind_nodes(graph, SEND) if graph.nodes["peer"][send] == rank]
        assert timeline.done_ns[back].max() <= start
        assert timeline.done_ns[kind_nodes(graph, GEMM1, rank)].max() <= start


def test_overlap_hides_sends():
    """Where sends and products take long, two steps are faster than one."""
    world = small_world("even", num_tokens=4096, hidden=2048, ffn=2048, hardware="4xH800")
    fast, slow = (fastermoe(world, group_size=size)[1].makespan_ns for size in (2, 4))
    assert fast < slow


def test_knobs_slow_down_as_they_say():
    world = small_world()
    usual = fastermoe(world)[1].makespan_ns
    for values in ({"send_ns": 20_000}, {"collective_ns": 60_000}, {"rate": 0.01}, {"group_size": 1}):
        assert fastermoe(world, **values)[1].makespan_ns > usual, values
    big = small_world(num_tokens=3000, hidden=512, ffn=512)
    few, many = (fastermoe(big, comm_sms=sms)[1].makespan_ns for sms in (4, 100))
    assert few < many


def test_rows_are_cut_into_equal_parts():
    world = small_world()
    graph, _ = fastermoe(world, cut="rows", degree=4)
    rows = np.bincount(graph.nodes["peer"][kind_nodes(graph, SEND)])
    assert (rows == 4 + 2 * 4 * 4).all()  # the counts, and four parts there and back with all four


# ---- shadows


def test_shadowed_rows_stay_and_are_computed_once():
    world = small_world("hot", num_tokens=3000, hidden=1024, ffn=1024)
    shadows = choose_shadows(world, 0.6)
    assert 0 in shadows  # the hot one
    graph, timeline = fastermoe(world, shadow=True)
    assert_computed_once(graph, world)
    _, plain_timeline = fastermoe(world)
    assert timeline.makespan_ns < plain_timeline.makespan_ns
    assert timeline.link_bytes.sum() < plain_timeline.link_bytes.sum()


def test_weights_cross_each_link_once():
    world = small_world("hot", num_tokens=3000, hidden=64, ffn=64)
    shadows = choose_shadows(world, 0.6)
    _, timeline = fastermoe(world, shadow=True)
    size = world.config.hidden * 2 * 2  # there and back, two bytes each
    rows = sum(
        int(expert not in shadows and world.routing.owner[expert] != rank)
        for rank, choices in enumerate(world.routing.topk_idx)
        for expert in choices.ravel()
    )
    experts = 2 + len(shadows)  # held by each rank: those counts are exchanged
    weights = len(shadows) * 3 * world.config.hidden * world.config.ffn * 2 * 3  # over three links of the ring
    counts = 4 * 3 * experts * COUNT_BYTES
    assert timeline.link_bytes.sum() == 2 * (rows * size + weights + counts)  # each link out is one in


def test_shadows_are_computed_after_their_weights_and_the_other_rows():
    world = small_world("hot", num_tokens=3000, hidden=512, ffn=2048)
    graph, timeline = fastermoe(world, shadow=True)
    first = world.config.num_experts_per_rank  # local index of a copy
    for rank in range(4):
        products = kind_nodes(graph, GEMM0, rank)
        copies = products[graph.nodes["expert"][products] >= first]
        others = products[graph.nodes["expert"][products] < first]
        if copies.size:
            assert timeline.start_ns[copies].min() >= timeline.done_ns[others].max()


def test_weights_come_from_the_owner_before_they_are_used():
    """All rows are the hot expert's, so every other rank has nothing to do until its weights are there."""
    world = small_world("hot", num_tokens=3000, hidden=1024, ffn=1024, num_topk=1)
    graph, timeline = fastermoe(world, shadow=True)
    nbytes = 3 * 1024 * 1024 * 2
    weights = [send for send in kind_nodes(graph, SEND) if graph.nodes["nbytes"][send] == nbytes]
    assert sorted(graph.nodes["peer"][weights]) == [1, 2, 3]  # all but the owner
    for send in weights:
        products = kind_nodes(graph, GEMM0, graph.nodes["peer"][send])
        assert timeline.done_ns[send] <= timeline.start_ns[products].min()


def test_no_shadow_where_none_pays():
    world = small_world("even")
    assert choose_shadows(world, 0.6).size == 0
    one, other = (fastermoe(world, shadow=shadow)[1].makespan_ns for shadow in (False, True))
    assert one == other


def test_shadowing_keeps_the_rows_of_each_expert():
    world = small_world("zipf:1.2", silent_ranks=(2,))
    shadows = np.array([3, 6])
    after = shadowed(world, shadows).routing
    original = np.concatenate([np.arange(8), np.repeat(shadows, 4)])
    chosen = world.routing.topk_idx
    np.testing.assert_array_equal(np.where(after.topk_idx >= 0, original[after.topk_idx], -1), chosen)
    for rank in range(4):
        mine = after.topk_idx[rank][np.isin(chosen[rank], shadows)]
        assert (after.owner[mine] == rank).all()
    owners_copies = [8 + 0 * 4 + world.routing.owner[3], 8 + 1 * 4 + world.routing.owner[6]]
    assert (after.counts[:, owners_copies] == 0).all()


def test_prediction_counts_what_it_says():
    world = small_world("hot", num_ranks=2, num_experts=4, num_topk=1, gated=False)
    matrix, hardware = 2 * world.config.hidden * world.config.ffn, world.hardware
    rows = 2 * 67  # all to expert 0
    tensor = rows * 2 * matrix / (hardware.tflops["bfloat16"] * 1e3 * 0.5)
    link = 67 * world.config.hidden * 4 / hardware.nvlink_gbps
    assert predicted_ns(world, np.array([], int), 0.5) == pytest.approx(tensor + link)
    assert predicted_ns(world, np.array([0]), 0.5) == pytest.approx(tensor / 2 + matrix * 2 / hardware.nvlink_gbps)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 3}, "group_size must divide num_ranks=4, got 3"),
        ({"comm_sms": 132}, "comm_sms must be less than the 132"),
        ({"cut": "columns"}, "cut must be one of groups, rows"),
        ({"degree": 0}, "degree must be at least 1"),
        ({"send_ns": -5}, "send_ns must be at least 0"),
    ],
)
def test_wrong_knobs(values, message):
    with pytest.raises(ValueError, match=message):
        fastermoe(small_world(), **values)
