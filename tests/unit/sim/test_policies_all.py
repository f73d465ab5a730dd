"""What holds of every policy: copies of experts, ties in time, and a docstring that says what it is."""

import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from policy_worlds import (
    assert_computed_once,
    assert_link_bytes,
    kind_nodes,
    make_graph,
    odd_worlds,
    run_both,
    run_policy,
    small_world,
)

from sim import PolicyKnobs
from sim.engine import plain
from sim.engine.kinds import COMBINE, GATE, SEND, SHARED0, SHARED1
from sim.policies import POLICY_NAMES, make_knobs
from sim.policies.scmoe import with_zero_experts
from sim.studies.what_if import NOT_CHOICES
from sim.world.placement import balance

WORLDS = odd_worlds()
ROUNDED, COUNTED = {"slack": 1}, {"counts": True}
# (policy, what its links may carry beside the rows and results, knobs that change what is moved or computed);
# COMET moves tokens, not rows, and DeepEP crosses a link once for several ranks: what they move is counted in theirs.
MOVES = [
    ("flashmoe", ROUNDED, {"packing": "per_source", "tile_m": 16, "ladder": False}),
    ("flashmoe", ROUNDED, {"packing": "per_expert", "tile_m": 16, "ladder": False}),
    ("flashmoe", ROUNDED, {"packing": "arrived", "tile_m": 16, "ladder": False}),
    ("megamoe", ROUNDED | COUNTED, {"split": False}),
    ("megamoe", ROUNDED | COUNTED, {"split": True}),
    ("sonic", {}, {}),
    ("sonic", {}, {"tile_m": 16, "tile_n": 64, "ping_pong": False}),
    ("t3", {}, {}),
    ("t3", {}, {"tile_m": 16, "tile_n": 50, "trigger_tiles": 1, "tracker_entries": 3, "op_and_store": False}),
    ("scmoe", {}, {}),
    ("scmoe", {}, {"zero_share": 1 / 3, "order": "free", "tile_m": 16}),
    ("scmoe", {}, {"overlap": False, "zero_share": 0.7}),
    ("nanoflow", ROUNDED, {"nano_batches": 1}),
    ("nanoflow", ROUNDED, {"tile_m": 16, "nano_batches": 3}),
    ("nanoflow", ROUNDED, {"overlap": False}),
    ("bulk", COUNTED, {"num_ops": 17, "framework_ns": 0}),
    ("fastermoe", COUNTED, {"group_size": 1}),
    ("fastermoe", COUNTED, {"group_size": 2}),
    ("fastermoe", COUNTED, {"group_size": 100}),
    ("fastermoe", COUNTED, {"cut": "rows", "degree": 3}),
]


def words(knobs):
    """A test's name."""
    return ",".join(f"{name}={value}" for name, value in knobs.items()) if isinstance(knobs, dict) else None


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize(("policy", "beside", "knobs"), MOVES, ids=words)
def test_every_row_is_moved_and_computed_once(policy, beside, knobs, name):
    world = WORLDS[name]
    if world.num_ranks == 1 and knobs == {"group_size": 2}:
        knobs = {"group_size": 1}
    graph, timeline = run_policy(policy, world, **knobs)
    left = replace(world, routing=with_zero_experts(world.routing, knobs.get("zero_share", 0.0), seed=1))
    assert_computed_once(graph, left)
    assert_link_bytes(graph, timeline, left, **beside)


def test_all_policies_but_those_that_move_tokens_move_rows():
    assert {policy for policy, _, _ in MOVES} == set(POLICY_NAMES) - {"comet", "deepep"}


GATED = [policy for policy in POLICY_NAMES if hasattr(make_knobs(policy, {}), "gate")]


@pytest.mark.parametrize("policy", GATED)
def test_the_gate_is_a_knob(policy):
    world = small_world()
    assert len(kind_nodes(make_graph(policy, world), GATE)) == world.num_ranks
    assert not len(kind_nodes(make_graph(policy, world, gate=False), GATE))


@pytest.mark.parametrize("hardware", ["4xH100", "2x2xH100"])
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_copies_of_experts_are_computed_where_they_are(policy, hardware):
    world = small_world("zipf:1.2", hardware=hardware)
    copied = replace(world, routing=balance(world.routing, 4))
    graph = make_graph(policy, copied)
    run_both(graph)
    assert_computed_once(graph, copied)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_ties_in_time_change_no_count(policy):
    graph = make_graph(policy, small_world("hot", hardware="2x2xH100"))
    usual = plain.run(graph)
    for seed in range(3):
        shuffled = plain.run(graph, tie_seed=seed)
        np.testing.assert_array_equal(shuffled.link_bytes, usual.link_bytes)
        tasks = np.bincount(shuffled.run_node, shuffled.run_count, graph.num_nodes)
        np.testing.assert_array_equal(tasks, graph.nodes["count"])
        assert shuffled.makespan_ns == pytest.approx(usual.makespan_ns, rel=0.05)


@pytest.mark.parametrize("name", ["uniform", "silent rank", "one token", "one rank", "two nodes"])
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_token_goes_through_the_shared_expert_once(policy, name):
    plain = WORLDS[name]
    world = replace(plain, config=replace(plain.config, shared_ffn=130))
    graph, c = make_graph(policy, world), world.config
    assert_computed_once(graph, world)
    nodes = graph.nodes
    for kind, columns, depth in ((SHARED0, 2 * 130, c.hidden), (SHARED1, c.hidden, 130)):
        for rank in range(c.num_ranks):
            mine = kind_nodes(graph, kind, rank)
            useful = (nodes["useful_flops"] * nodes["count"])[mine].sum()
            assert useful == pytest.approx(2 * c.num_tokens * columns * depth)
            assert (nodes["flops"] >= nodes["useful_flops"])[mine].all()
    without, timeline = run_both(make_graph(policy, plain)), run_both(graph)
    np.testing.assert_array_equal(timeline.link_bytes, without.link_bytes)
    assert timeline.makespan_ns >= without.makespan_ns


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_results_are_whole_when_the_shared_expert_is_done(policy):
    """A COMBINE reads its rows, one more for each token; where memory adds up what arrives, it adds to them."""
    plain = small_world()
    world = replace(plain, config=replace(plain.config, shared_ffn=130))
    graph = make_graph(policy, world)
    for rank in range(4):
        shared = kind_nodes(graph, SHARED1, rank)
        assert {*shared.tolist()} <= descendants(graph, kind_nodes(graph, SHARED0, rank))
        last = kind_nodes(graph, COMBINE if policy != "t3" else SEND, rank)
        assert {*last.tolist()} <= descendants(graph, shared), f"rank {rank}"
    times = [combine_time(make_graph(policy, one)) for one in (plain, world)]
    assert times[0] < times[1] or policy == "t3"


@pytest.mark.parametrize(("policy", "stages"), [("comet", "layer0"), ("deepep", "dispatch")])
def test_a_shared_expert_is_not_left_out_silently(policy, stages):
    world = small_world()
    world = replace(world, config=replace(world.config, shared_ffn=130))
    with pytest.raises(ValueError, match=f"shared_ffn must be 0 with policy {policy} and these knobs, .*; got 130"):
        make_graph(policy, world, stages=stages)


def combine_time(graph):
    nodes, mine = graph.nodes, kind_nodes(graph, COMBINE)
    return (nodes["duration_ns"] * nodes["count"])[mine].sum()


def descendants(graph, nodes):
    """Whatever waits for all or some of these nodes, directly or not."""
    found, left = set(), list(nodes)
    while left:
        new = set(graph.successors(left.pop()).tolist()) - found
        found |= new
        left.extend(new)
    return found


@pytest.mark.parametrize("silent_ranks", [(1,), (0, 1, 2, 3)])
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_combine_waits_for_its_ranks_gate(policy, silent_ranks):
    """Also that of tokens which have no row anywhere: what they chose is known then, and not before."""
    graph = make_graph(policy, small_world(silent_ranks=silent_ranks))
    for rank in range(4):
        combines = set(kind_nodes(graph, COMBINE, rank).tolist())
        assert combines <= descendants(graph, kind_nodes(graph, GATE, rank)), f"rank {rank}"
        assert combines or policy == "t3", "only in T3 does memory add what arrives"


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_docstrings_say_the_source_what_is_left_out_and_every_knob(policy):
    kind = type(make_knobs(policy, {}))
    about = sys.modules[kind.__module__].__doc__
    assert "\nSource: " in about and "Leaves out: " in " ".join(about.split())
    explained = f"{PolicyKnobs.__doc__} {kind.__doc__}".replace(",", " ").replace(":", " ").split()
    assert [field.name for field in fields(kind) if field.name not in explained] == []


def test_what_is_no_choice_is_a_knob_of_some_policy():
    names = {field.name for policy in POLICY_NAMES for field in fields(make_knobs(policy, {}))}
    assert names >= NOT_CHOICES
