"""ScMoE: dense work beside the transfers, expert products alone, and choices that go nowhere."""

from functools import partial

import numpy as np
import pytest
from policy_worlds import kind_nodes, run_policy, small_world

from sim.engine.kinds import COMBINE, DENSE, GEMM0, GEMM1, SEND
from sim.policies import make_knobs
from sim.policies.scmoe import with_zero_experts

BIG = {"num_tokens": 3000, "hidden": 1024, "ffn": 512}

scmoe = partial(run_policy, "scmoe")


def test_zero_experts_are_a_share_of_the_choices():
    routing = small_world(num_tokens=2000).routing
    changed = with_zero_experts(routing, 0.4, 1)
    zero = changed.topk_idx == -1
    assert abs(zero.mean() - 0.4) < 0.02
    assert len(np.unique(zero.sum(axis=2))) == 3  # real k varies per token: 0, 1 or 2
    np.testing.assert_array_equal(changed.topk_idx[~zero], routing.topk_idx[~zero])
    assert (with_zero_experts(routing, 0.4, 2).topk_idx != changed.topk_idx).any()


def test_zero_experts_cost_the_reading_of_a_token():
    world = small_world(**BIG)
    work = {}
    for share in (0.0, 1.0):
        graph, timeline = scmoe(world, zero_share=share)
        combine = kind_nodes(graph, COMBINE)
        work[share] = (graph.nodes["duration_ns"][combine] - 1000).sum()  # without the fixed part
    assert timeline.link_bytes.sum() == 0 and len(kind_nodes(graph, GEMM0)) == 0
    np.testing.assert_allclose(
        work[1.0] / work[0.0], 2 / 3, rtol=0.01
    )  # the token itself, not two results, and the sum


def beside(timeline, one, other):
    """Whether any of these nodes ran while any of those did."""
    starts, ends = timeline.start_ns, timeline.done_ns
    return bool(((starts[one][:, None] < ends[other]) & (ends[one][:, None] > starts[other])).any())


def test_staged_dense_work_runs_beside_transfers_and_never_beside_expert_products():
    world = small_world(**BIG)
    graph, timeline = scmoe(world)
    for rank in range(world.num_ranks):
        dense, sends = kind_nodes(graph, DENSE, rank), kind_nodes(graph, SEND, rank)
        products = np.concatenate([kind_nodes(graph, kind, rank) for kind in (GEMM0, GEMM1)])
        assert not beside(timeline, dense, products)
        first = dense[timeline.done_ns[dense] <= timeline.start_ns[products].min()]
        later = dense[timeline.start_ns[dense] >= timeline.done_ns[products].max()]
        assert (len(first), len(later)) == (3, 3)  # up, down, qkv; output, up, down
        assert beside(timeline, first, sends) and beside(timeline, later, sends)


@pytest.mark.parametrize(("stages", "kernels"), [(1, 2), (3, 4), (4, 6)])
def test_how_many_stages_run_beside_the_dispatch(stages, kernels):
    graph, timeline = scmoe(small_world(), stages_beside_dispatch=stages)
    dense, products = kind_nodes(graph, DENSE, 0), kind_nodes(graph, GEMM0, 0)
    assert (timeline.done_ns[dense] <= timeline.start_ns[products].min()).sum() == kernels


def test_without_overlap_the_dense_work_comes_after_and_the_block_takes_longer():
    world = small_world(**BIG)
    graph, timeline = scmoe(world, overlap=False)
    for rank in range(world.num_ranks):
        dense, combine = kind_nodes(graph, DENSE, rank), kind_nodes(graph, COMBINE, rank)
        assert timeline.start_ns[dense].min() >= timeline.done_ns[combine].max()
    for order in ("staged", "free"):
        assert scmoe(world, order=order)[1].makespan_ns < timeline.makespan_ns


def test_the_free_order_waits_for_nothing_and_the_first_has_the_slots():
    world = small_world(**BIG)
    done = {}
    for first in ("moe", "dense"):
        graph, timeline = scmoe(world, order="free", first=first)
        dense, products = kind_nodes(graph, DENSE), kind_nodes(graph, GEMM1)
        assert beside(timeline, dense, products)
        done[first] = timeline.done_ns[dense].max(), timeline.done_ns[products].max()
    assert done["dense"][0] < done["moe"][0] and done["moe"][1] < done["dense"][1]


@pytest.mark.parametrize("gated", [True, False])
def test_how_much_dense_work_there_is(gated):
    world = small_world(gated=gated)
    per_token = 2 * 192 * (4 * 192 + 2 * (3 if gated else 2) * 384)
    for dense_ffn, expected in ((None, per_token), (100, 2 * 192 * (4 * 192 + 2 * (3 if gated else 2) * 100))):
        graph, _ = scmoe(world, dense_ffn=dense_ffn)
        dense = kind_nodes(graph, DENSE)
        work = (graph.nodes["useful_flops"] * graph.nodes["count"])[dense].sum()
        np.testing.assert_allclose(work, expected * 67 * world.num_ranks)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_share": 1.1}, r"zero_share must be in \[0, 1\], got 1.1"),
        ({"order": "any"}, r"order must be one of staged, free; got 'any'"),
        ({"first": "gpu"}, r"first must be one of moe, dense; got 'gpu'"),
        ({"stages_beside_dispatch": 5}, r"stages_beside_dispatch must be in \[1, 4\], got 5"),
        ({"dense_ffn": 0}, r"dense_ffn must be at least 1, got 0"),
    ],
)
def test_wrong_values_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        make_knobs("scmoe", values)
