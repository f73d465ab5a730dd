"""What holds of every policy: copies of experts, ties in time, and a docstring that says what it is."""

import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from policy_worlds import assert_computed_once, kind_nodes, run_both, small_world

from sim import PolicyKnobs
from sim.engine import plain
from sim.engine.kinds import COMBINE, GATE
from sim.policies import POLICY_NAMES, build, make_knobs
from sim.studies.what_if import NOT_CHOICES
from sim.world.placement import balance


def graph_of(policy, world):
    return build(policy, world, make_knobs(policy, {}))


@pytest.mark.parametrize("hardware", ["4xH100", "2x2xH100"])
@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_copies_of_experts_are_computed_where_they_are(policy, hardware):
    world = small_world("zipf:1.2", hardware=hardware)
    copied = replace(world, routing=balance(world.routing, 4))
    graph = graph_of(policy, copied)
    run_both(graph)
    assert_computed_once(graph, copied)


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_ties_in_time_change_no_count(policy):
    graph = graph_of(policy, small_world("hot", hardware="2x2xH100"))
    usual = plain.run(graph)
    for seed in range(3):
        shuffled = plain.run(graph, tie_seed=seed)
        np.testing.assert_array_equal(shuffled.link_bytes, usual.link_bytes)
        tasks = np.bincount(shuffled.run_node, shuffled.run_count, graph.num_nodes)
        np.testing.assert_array_equal(tasks, graph.nodes["count"])
        assert shuffled.makespan_ns == pytest.approx(usual.makespan_ns, rel=0.05)


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
    graph = graph_of(policy, small_world(silent_ranks=silent_ranks))
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
