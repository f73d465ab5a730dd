"""Backwards and training steps of all policies that have them: what is multiplied, moved and waited for."""

from dataclasses import replace

import numpy as np
import pytest
from policy_worlds import (
    assert_link_bytes,
    carried_bytes,
    demanded_rows,
    kind_nodes,
    make_graph,
    odd_worlds,
    run_policy,
    small_world,
)

from sim import POLICY_NAMES, Scenario, make_knobs, report, simulate
from sim.drafting.backward import GradientTile, expert_gradients, router_gradients
from sim.drafting.draft import Draft
from sim.drafting.passes import backward_pass
from sim.drafting.roof import roof_ns
from sim.engine.compiled import run
from sim.engine.kinds import (
    COMBINE,
    DISPATCH,
    GATE,
    GEMM0,
    GEMM1,
    RECEIVE,
    ROUTER_WEIGHTS,
    SHARED0,
    SHARED1,
    SHARED_WEIGHTS,
    WEIGHTS,
)
from sim.policies import build, passes_of
from sim.world.placement import balance

ABLE = ("flashmoe", "sonic", "bulk", "deepep")
KNOBS = {"flashmoe": {"tile_m": 16}, "sonic": {}, "bulk": {"num_ops": 17}, "deepep": {"mode": "normal"}}
WORLDS = odd_worlds()
SUM_BYTES = 4


def backward(world, passes="backward", shared_ffn=0):
    return replace(world, passes=passes, config=replace(world.config, shared_ffn=shared_ffn))


def operations(graph, *kinds):
    mine = np.isin(graph.nodes["kind"], kinds)
    assert (graph.nodes["flops"] >= graph.nodes["useful_flops"] - 1e-6)[mine].all()
    return float((graph.nodes["useful_flops"] * graph.nodes["count"])[mine].sum())


# ---- what is multiplied


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("policy", ABLE)
def test_every_row_is_multiplied_twice_as_often_as_forwards(policy, name):
    """Once for its gradient and once for those of weights, of each of its matrices; likewise tokens and the router."""
    world = backward(WORLDS[name], shared_ffn=40)
    graph, _ = run_policy(policy, world, **KNOBS[policy])
    c, rows, tokens = world.config, demanded_rows(world).sum(), world.num_ranks * world.routing.num_tokens
    ups = c.ffn * (2 if c.gated else 1)
    routed = tokens * 2 * c.hidden * c.num_experts
    shared = tokens * 2 * c.hidden * 40 * (3 if c.gated else 2)
    expected = {
        (GEMM0,): rows * 2 * c.hidden * c.ffn,
        (GEMM1,): rows * 2 * c.hidden * ups,
        (WEIGHTS,): rows * 2 * c.hidden * (ups + c.ffn),
        (ROUTER_WEIGHTS,): routed,
        (GATE, COMBINE): routed,
        (SHARED0, SHARED1): shared,
        (SHARED_WEIGHTS,): shared,
    }
    for kinds, number in expected.items():
        assert operations(graph, *kinds) == pytest.approx(number, rel=1e-9), kinds


@pytest.mark.parametrize(("save", "more"), [("rows+up", 0), ("rows", 1), ("nothing", 1)])
def test_what_was_not_kept_is_multiplied_again(save, more):
    """The products with the up matrices, and nothing else."""
    world = backward(small_world())
    graph = make_graph("flashmoe", world, save=save, packing="per_source")
    c, rows = world.config, demanded_rows(world).sum()
    assert operations(graph, GEMM0) == pytest.approx(rows * 2 * c.hidden * c.ffn * (1 + 2 * more))
    kept = make_graph("flashmoe", world, packing="per_source")
    assert operations(graph, GEMM1, WEIGHTS) == operations(kept, GEMM1, WEIGHTS)


@pytest.mark.parametrize("policy", ABLE)
def test_a_training_step_is_a_forward_and_its_backward(policy):
    world = small_world(num_tokens=300)
    passes = {name: make_graph(policy, backward(world, name, 40), **KNOBS[policy]) for name in
              ("forward", "backward", "training")}  # fmt: skip
    forward, back, both = ({k: operations(graph, k) for k in range(16)} for graph in passes.values())
    assert both == pytest.approx({kind: forward[kind] + back[kind] for kind in forward})


@pytest.mark.parametrize("policy", ABLE)
def test_copies_of_experts_have_gradients_of_their_own(policy):
    world = backward(small_world("zipf:1.2"))
    copied = replace(world, routing=balance(world.routing, 4))
    one, other = (make_graph(policy, each, **KNOBS[policy]) for each in (world, copied))
    assert operations(one, WEIGHTS) == pytest.approx(operations(other, WEIGHTS))
    with_rows = [np.count_nonzero(each.routing.counts.sum(axis=0)) for each in (world, copied)]
    assert [len(kind_nodes(graph, WEIGHTS)) for graph in (one, other)] == [2 * number for number in with_rows]


# ---- what is moved


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize(("policy", "slack"), [("flashmoe", 1), ("sonic", 0), ("bulk", 0)])
def test_gradients_go_the_way_of_rows_once(policy, slack, name):
    graph, timeline = run_policy(policy, backward(WORLDS[name]), **KNOBS[policy])
    assert_link_bytes(graph, timeline, WORLDS[name], slack=slack)


@pytest.mark.parametrize("name", WORLDS)
def test_deepep_moves_gradients_as_it_moves_tokens(name):
    world = WORLDS[name]
    moved = [
        carried_bytes(*run_policy("deepep", each, mode="normal"), world.num_ranks) for each in (world, backward(world))
    ]
    np.testing.assert_array_equal(*moved)


def test_rows_that_were_not_kept_are_sent_again():
    world = backward(small_world())
    graphs = {save: make_graph("flashmoe", world, save=save, tile_m=16) for save in ("rows+up", "rows", "nothing")}
    sent = {save: moved_by(graph, DISPATCH) for save, graph in graphs.items()}
    back = {save: moved_by(graph, GEMM1) for save, graph in graphs.items()}
    assert sent["rows"] == sent["rows+up"] and sent["nothing"] == pytest.approx(2 * sent["rows"], rel=1e-3)
    assert all(value > 0 for value in back.values())


def moved_by(graph, kind):
    mine = kind_nodes(graph, kind)
    return (graph.nodes["nbytes"] * graph.nodes["count"])[mine].sum()


@pytest.mark.parametrize("shared_ffn", [0, 40])
@pytest.mark.parametrize("policy", ABLE)
def test_dense_gradients_are_summed_over_ranks(policy, shared_ffn):
    """Every rank sends every other its part of the sums, and then the sum of its own part."""
    world = small_world()
    forward, back, both = (
        carried_bytes(*run_policy(policy, backward(world, passes, shared_ffn), **KNOBS[policy]), world.num_ranks)
        for passes in ("forward", "backward", "training")
    )
    elements = world.config.hidden * (world.config.num_experts + 3 * shared_ffn)
    part = -(-elements * SUM_BYTES // 4)
    slack = 2 * 8 * 67 * 2 if policy == "flashmoe" else 0  # tiles are others, and bytes of a task whole
    assert (np.abs(both - forward - back - 2 * 3 * part) <= slack).all()


def test_on_one_rank_nothing_is_summed():
    graph, timeline = run_policy("sonic", backward(small_world(num_ranks=1), "training"))
    assert not timeline.link_bytes.any() and graph.num_nodes


# ---- what is waited for


def ancestors(graph, nodes):
    """Whatever these nodes wait for, directly or not."""
    before = [[] for _ in range(graph.num_nodes)]
    for node in range(graph.num_nodes):
        for after in graph.successors(node).tolist():
            before[after].append(node)
    found, left = set(), list(nodes)
    while left:
        new = set(before[left.pop()]) - found
        found |= new
        left.extend(new)
    return found


@pytest.mark.parametrize("name", ["uniform", "silent rank", "two nodes", "one token", "k = E"])
@pytest.mark.parametrize("packing", ["arrived", "per_source", "per_expert"])
def test_gradients_of_weights_wait_for_all_their_rows(packing, name):
    world = backward(WORLDS[name], shared_ffn=40)
    graph = make_graph("flashmoe", world, packing=packing, tile_m=16)
    kind, rank, expert = (graph.nodes[field] for field in ("kind", "rank", "expert"))
    for node in kind_nodes(graph, WEIGHTS).tolist():
        mine = (rank == rank[node]) & (expert == expert[node])
        needed = set(np.flatnonzero(mine & np.isin(kind, (RECEIVE, GEMM0))).tolist())
        assert set(graph.predecessors(node).tolist()) == needed
    for one_rank in range(world.num_ranks):
        for waiting, needed in ((ROUTER_WEIGHTS, COMBINE), (SHARED_WEIGHTS, SHARED0)):
            for node in kind_nodes(graph, waiting, one_rank).tolist():
                assert set(graph.predecessors(node).tolist()) == set(kind_nodes(graph, needed, one_rank).tolist())


@pytest.mark.parametrize("policy", ABLE)
def test_a_rank_ends_its_forward_before_its_backward(policy):
    """On each rank all products of the backward, and all gradients of weights, wait for all COMBINEs of the forward."""
    world = backward(small_world(num_tokens=300), "training")
    graph, timeline = run_policy(policy, world, **KNOBS[policy])
    for rank in range(world.num_ranks):
        first = kind_nodes(graph, WEIGHTS, rank)
        combines = kind_nodes(graph, COMBINE, rank)
        forwards = combines[: len(combines) // 2]
        assert set(forwards.tolist()) <= ancestors(graph, first[:1].tolist())
        for kind in (GEMM0, GEMM1):
            products = kind_nodes(graph, kind, rank)
            later = products[products > forwards.max()]
            assert (timeline.ready_ns[later] >= timeline.done_ns[forwards].max()).all() and len(later)


def test_results_do_not_wait_for_gradients_of_weights():
    """In one kernel; the rows that others wait for are not behind a whole expert."""
    graph = make_graph("flashmoe", backward(small_world()), packing="per_source", tile_m=16)
    before = ancestors(graph, kind_nodes(graph, COMBINE).tolist())
    assert not before & set(kind_nodes(graph, WEIGHTS).tolist())


@pytest.mark.parametrize("policy", ABLE)
def test_kernels_wait_for_what_they_use(policy):
    """dx is summed behind all second products, and an expert's gradients behind its first ones."""
    graph = make_graph(policy, backward(small_world()), **KNOBS[policy])
    before = {kind: ancestors(graph, kind_nodes(graph, kind, 0).tolist()) for kind in (GEMM1, COMBINE, WEIGHTS)}
    assert set(kind_nodes(graph, GEMM0, 0).tolist()) <= before[GEMM1] & before[WEIGHTS]
    assert set(kind_nodes(graph, GEMM1, 0).tolist()) & before[COMBINE]


# ---- how long it takes


def draft_of(world, **cost):
    made = make_knobs("sonic", {"rate": 0.5, "tile_latency_ns": 0})
    return Draft(world, made, "sonic", world.hardware.sms, **cost).turned(backward_pass(world))


def gradients_of_one_expert(tokens, **cost):
    """A graph of 512 x 1024 and 1024 x 512, in tiles of 128 x 256, 32 in all; and the hardware."""
    sizes = {"num_ranks": 1, "hidden": 1024, "ffn": 512, "num_experts": 1, "num_topk": 1, "gated": False}
    world = backward(small_world(num_tokens=tokens, **sizes))
    draft = draft_of(world, **cost)
    nodes, _ = expert_gradients(draft, GradientTile(128, 256))
    graph = draft.builder.build()
    assert graph.nodes["count"][nodes.ravel()].tolist() == [16, 16]
    return graph, world.hardware


def test_products_bound_the_gradients_of_many_rows():
    graph, hardware = gradients_of_one_expert(40_000)
    bound = 2 * 128 * 256 * 40_000 / (989.4e3 * 0.5) * hardware.sms
    np.testing.assert_allclose(graph.nodes["duration_ns"], bound, rtol=1e-3)
    assert not graph.nodes["streamed"].any()


def test_the_way_of_sums_to_memory_bounds_the_gradients_of_few_rows():
    """They are what is streamed, beside the one operand that comes from memory once for all row tiles."""
    sums, operands = 128 * 256 * 2 * SUM_BYTES, np.array([128, 256]) * 8 * 2
    streamed = sums + operands[1] / np.array([4, 8])
    graph, hardware = gradients_of_one_expert(8)
    port = min(hardware.l2_gbps / 32, max(hardware.l2_gbps / hardware.sms, 64 * hardware.clock_ghz))
    np.testing.assert_array_equal(graph.nodes["streamed"], streamed)
    np.testing.assert_allclose(graph.nodes["duration_ns"], (sums + operands.sum()) / port, rtol=1e-3)
    gbps = hardware.hbm_gbps * hardware.hbm_achieved * 0.89
    assert run(graph).makespan_ns == pytest.approx(16 * streamed.sum() / gbps, rel=1e-3)
    fixed, _ = gradients_of_one_expert(8, fixed_shares=True)
    np.testing.assert_allclose(fixed.nodes["duration_ns"], streamed * 32 / gbps, rtol=1e-3)


@pytest.mark.parametrize("policy", ["bulk", "sonic"])
@pytest.mark.parametrize(("terms", "height", "tiles"), [("system", 16, 48), ("schedule", 128, 3)])
def test_few_rows_go_backwards_in_low_tiles_that_fill_waves(policy, terms, height, tiles):
    """As they go forwards: two row blocks of 768 columns have most tiles in one wave where these are 16 wide."""
    world = backward(small_world(num_tokens=4, hidden=512, ffn=768, num_experts=8, num_topk=2))
    nodes = build(policy, world, make_knobs(policy, {}, terms)).nodes
    first = nodes["kind"] == GEMM0
    np.testing.assert_array_equal(nodes["count"][first], tiles)
    np.testing.assert_allclose((nodes["count"] * nodes["flops"])[first], 2.0 * 512 * 768 * height)


def test_few_tiles_of_the_router_are_cut_by_tokens():
    world = backward(small_world(num_ranks=1, num_tokens=4096))
    draft = draft_of(world)
    whole, cut = (router_gradients(draft, GradientTile(128, 128), split=split) for split in (False, True))
    nodes = draft.builder.build().nodes
    assert [int(nodes["count"][n]) for n in (*whole, *cut)] == [2, 2 * 32]
    assert nodes["duration_ns"][cut] < nodes["duration_ns"][whole] / 8
    assert nodes["useful_flops"][cut] * 64 == pytest.approx(nodes["useful_flops"][whole] * 2)


def test_what_a_tile_keeps_is_streamed_where_memory_bounds_it():
    """A first product of a training step moves more than that of a forward alone where the memory is slow.

    By the bytes of its real rows: the row read and written, and its up-products.
    """
    world = small_world(num_tokens=300)
    slow = replace(world, hardware=replace(world.hardware, hbm_gbps=20.0))
    streamed = {}
    for save in ("rows+up", "nothing"):
        graph = make_graph("flashmoe", backward(slow, "training"), save=save, packing="per_source")
        streamed[save] = graph.nodes["streamed"][kind_nodes(graph, GEMM0)[0]]
    alone = make_graph("flashmoe", slow, packing="per_source").nodes
    mine = (alone["kind"] == GEMM0) & (alone["rank"] == 0)
    assert streamed["nothing"] == alone["streamed"][mine][0]
    c, ups = world.config, 2 * world.config.ffn
    rows = alone["useful_flops"][mine][0] / (2 * c.hidden * ups)  # of a row block, over its column tiles
    kept = rows * (2 * c.hidden + ups) * 2
    assert streamed["rows+up"] - streamed["nothing"] == pytest.approx(kept, abs=1)


@pytest.mark.parametrize("passes", ["backward", "training"])
@pytest.mark.parametrize("policy", ABLE)
@pytest.mark.parametrize(("tokens", "hardware"), [(1, "8xH100"), (33, "8xH20"), (700, "8xA100")])
def test_no_backward_is_below_the_roof(policy, passes, tokens, hardware):
    sizes = {"num_ranks": 8, "num_tokens": tokens, "hidden": 2048, "ffn": 768, "num_experts": 64, "num_topk": 3}
    world = backward(small_world(**sizes, hardware=hardware), passes)
    assert 1000 * simulate(policy, world, keep_runs=False).latency_us >= max(roof_ns(world).values())


def test_the_roof_of_a_backward_is_twice_a_forwards():
    forward, back, both = (roof_ns(backward(small_world(), passes)) for passes in ("forward", "backward", "training"))
    for name, times in {"weights": 2, "products": 2, "links": 1}.items():
        assert back[name] == pytest.approx(times * forward[name])
        assert both[name] == pytest.approx((1 + times) * forward[name])


# ---- what is asked for


def test_policies_without_a_backward_name_those_that_have_one():
    assert tuple(name for name in POLICY_NAMES if "training" in passes_of(name)) == ABLE
    for policy in set(POLICY_NAMES) - {*ABLE}:
        for passes in ("backward", "training"):
            rule = f"passes must be forward with policy {policy}; others have {', '.join(ABLE)}; got {passes}"
            with pytest.raises(ValueError, match=rule):
                make_graph(policy, backward(small_world(), passes))


def test_bad_passes_are_refused():
    world = small_world()
    with pytest.raises(ValueError, match="passes must be one of forward, backward, training; got 'back'"):
        replace(world, passes="back")
    narrow = small_world(precision_name="fp8")
    with pytest.raises(ValueError, match=r"passes must be forward with precision fp8, .* got training"):
        replace(narrow, passes="training")
    with pytest.raises(ValueError, match="mode must be normal, and stages layer, where passes is backward; got "):
        make_graph("deepep", backward(world), mode="low_latency")
    with pytest.raises(ValueError, match="got mode=normal and stages=dispatch"):
        make_graph("deepep", backward(world), mode="normal", stages="dispatch")
    assert make_knobs("deepep", {}).in_world(backward(world)).mode == "normal"
    with pytest.raises(ValueError, match="save must be one of"):
        make_knobs("flashmoe", {"save": "all"})


def test_a_backward_needs_memory_for_gradients():
    world = small_world()
    rows = int(world.rows.max())
    back = backward(world)
    assert back.row_bytes - world.row_bytes == rows * (world.config.hidden + world.up_columns) * 2
    assert back.memory_bytes - world.memory_bytes == back.row_bytes - world.row_bytes + world.weight_bytes
    full = (world.memory_bytes + 1) / 1e9
    with pytest.raises(ValueError, match="the busiest rank needs"):
        replace(back, hardware=replace(world.hardware, hbm_gb=full))


@pytest.mark.parametrize("policy", ["flashmoe", "deepep"])
def test_without_a_gate_it_has_no_gradients(policy):
    graph = make_graph(policy, backward(small_world(), shared_ffn=40), **KNOBS[policy], gate=False)
    assert operations(graph, GATE, COMBINE, ROUTER_WEIGHTS) == 0 < operations(graph, SHARED_WEIGHTS)


def test_micro_batches_add_up():
    world = backward(small_world(num_tokens=300), shared_ffn=40)
    one, two = (make_graph("deepep", world, micro_batches=number) for number in (1, 2))
    for kinds in ((WEIGHTS,), (ROUTER_WEIGHTS,), (SHARED_WEIGHTS,), (GEMM0, GEMM1)):
        assert operations(one, *kinds) == pytest.approx(operations(two, *kinds))


def test_reports_say_the_pass_and_that_no_fit_saw_one():
    world = replace(small_world(), config=small_world().config)
    said = {passes: report(simulate("sonic", backward(world, passes))) for passes in ("forward", "training")}
    assert said["training"].passes == "training" and said["training"].left_out_error is None
    assert said["forward"].tokens_per_s > said["training"].tokens_per_s
    made = Scenario(config=world.config, hardware="4xH100", precision="bfloat16", passes="backward").make()
    assert made.passes == "backward" and made.directions == ("backward",)
