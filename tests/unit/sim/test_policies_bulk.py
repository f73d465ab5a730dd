"""Bulk: phases that nothing crosses, and knobs that do what they say."""

from itertools import pairwise

import numpy as np
import pytest
from policy_worlds import demanded_rows, kind_nodes, odd_worlds, run_policy, small_world

from sim.engine.kinds import BARRIER, COMBINE, GEMM0, GEMM1, LAUNCH, SEND
from sim.policies import make_knobs

WORLDS = odd_worlds()


def bulk(world, **values):
    return run_policy("bulk", world, **{"num_ops": 17, "framework_ns": 0, **values})


@pytest.mark.parametrize("name", WORLDS)
def test_phases_do_not_mix(name):
    """The rows of all ranks are there before anything is multiplied, and all results before anything goes back."""
    world = WORLDS[name]
    graph, timeline = bulk(world)
    pairs = np.count_nonzero(demanded_rows(world) + np.eye(world.num_ranks))  # a rank always sends to itself
    sends = np.split(kind_nodes(graph, SEND), [world.num_ranks**2, world.num_ranks**2 + pairs])  # counts, rows, results
    assert len(sends[2]) == pairs
    phases = [sends[0], sends[1], kind_nodes(graph, GEMM0), kind_nodes(graph, GEMM1), sends[2]]
    phases = [phase for phase in [*phases, kind_nodes(graph, COMBINE)] if phase.size]
    for earlier, later in pairwise(phases):
        assert timeline.done_ns[earlier].max() <= timeline.start_ns[later].min()


def test_the_slowest_rank_holds_up_all():
    """With all rows on one rank, the others come to the second half of the layer when that one is through."""
    world = small_world("to-rank-0", hidden=512, ffn=512, num_tokens=500)
    graph, timeline = bulk(world)
    products = timeline.done_ns[kind_nodes(graph, GEMM1)].max()
    back = [node for node in kind_nodes(graph, SEND) if timeline.start_ns[node] >= products]
    assert set(graph.nodes["rank"][back]) == set(range(world.num_ranks))
    assert set(graph.nodes["rank"][kind_nodes(graph, GEMM0)]) == {0}


def test_ops_are_launches():
    world = small_world()
    for num_ops in (11, 12, 33, 100):
        graph, _ = bulk(world, num_ops=num_ops)
        launches = np.bincount(graph.nodes["rank"][kind_nodes(graph, LAUNCH)])
        assert (launches == num_ops + 1).all()  # and the host reads the counts
    assert len(kind_nodes(graph, BARRIER)) == 6  # three collectives, each with a beginning and an end


def test_knobs_slow_down_as_they_say():
    world = small_world()
    usual = bulk(world)[1].makespan_ns
    for values in ({"num_ops": 100}, {"framework_ns": 5000}, {"op_ns": 9000}, {"straggler_ns": 20_000}, {"rate": 0.01}):
        assert bulk(world, **values)[1].makespan_ns > usual, values
    assert bulk(world, collective_ns=50_000)[1].makespan_ns - usual == 3 * 20_000


def test_few_ops_on_a_big_layer_hide_behind_the_products():
    """The host runs ahead: more launches after the counts cost nothing while the GPU is busy."""
    world = small_world(num_tokens=2000, hidden=1024, ffn=1024)
    one, other = (bulk(world, num_ops=12, op_ns=0, framework_ns=host)[1].makespan_ns for host in (0, 1000))
    assert other - one < 6 * 1000


def test_stragglers_are_random_and_repeatable():
    world = small_world()
    first, again, other = (bulk(world, straggler_ns=5000, straggler_seed=seed)[1].makespan_ns for seed in (1, 1, 2))
    assert first == again != other
    graph, _ = bulk(world, straggler_ns=5000, num_ops=550)
    delays = graph.nodes["duration_ns"][kind_nodes(graph, LAUNCH)] - world.hardware.launch_ns
    assert delays.size == 4 * 551
    assert delays.mean() == pytest.approx(5000, rel=0.1)
    assert delays.std() == pytest.approx(5000, rel=0.15)  # an exponential's is its mean


def test_one_rank_calls_no_collective():
    world = small_world(num_ranks=1)
    one, other = (bulk(world, collective_ns=floor)[1].makespan_ns for floor in (30_000, 60_000))
    assert one == other
    assert demanded_rows(world).sum() == 67 * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_ops": 10}, "num_ops must be at least 11"),
        ({"straggler_ns": -1}, "straggler_ns must be at least 0"),
        ({"tile_m": 0}, "tile_m must be at least 1"),
        ({"rate": 1.5}, r"rate must be in \(0, 1\]"),
        ({"nothing": 1}, "policy bulk has the knobs"),
    ],
)
def test_wrong_knobs(values, message):
    with pytest.raises(ValueError, match=message):
        make_knobs("bulk", values)
