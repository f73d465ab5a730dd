"""Pictures of simulations: the bands hold what the tasks held, and the title says that it is simulated."""

import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_worlds import small_world

from sim.engine import kinds
from sim.policies import POLICY_NAMES
from sim.reading import plots
from sim.reading.plots import colours, held_slots, plot_timeline
from sim.reading.steps import levels, means
from sim.simulation import simulate

INTERVALS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 20), st.integers(0, 20), st.integers(1, 5)))


@given(intervals=INTERVALS, edges=st.lists(st.integers(0, 20), min_size=2, unique=True))
def test_means_are_those_counted_by_hand(intervals, edges):
    edges = np.sort(edges)
    group, one, other, weight = np.array(intervals, np.int64).reshape(-1, 4).T
    start, end = np.minimum(one, other), np.maximum(one, other)
    level = np.zeros((3, 20))
    for of, begin, until, height in zip(group, start, end, weight, strict=True):
        level[of, begin:until] += height
    expected = [[level[of, low:high].mean() for low, high in pairwise(edges)] for of in range(3)]
    steps = levels(group, start, end, weight, 3, 20)
    np.testing.assert_allclose(means(steps, 3, edges), expected, atol=1e-12)


@given(intervals=INTERVALS)
def test_steps_cover_all_time_of_every_group(intervals):
    group, one, other, weight = np.array(intervals, np.int64).reshape(-1, 4).T
    steps = levels(group, np.minimum(one, other), np.maximum(one, other), weight, 3, 20)
    assert (steps.right > steps.left).all()
    np.testing.assert_array_equal(np.bincount(steps.group, steps.right - steps.left), [20, 20, 20])


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_bands_hold_all_slot_time(policy):
    simulation = simulate(policy, small_world())
    nodes, servers = simulation.graph.nodes, simulation.graph.servers
    edges = np.linspace(0, simulation.timeline.makespan_ns, 50)
    assert colours(simulation)
    for kind in colours(simulation):
        mine = (nodes["kind"] == kind) & (nodes["server"] >= 0)
        place = [servers[server].rank for server in nodes["server"][mine]]
        expected = np.bincount(place, (nodes["count"] * nodes["duration_ns"])[mine], 4)
        held = held_slots(simulation, kind, 4, edges)
        np.testing.assert_allclose((held * np.diff(edges)).sum(axis=1), expected)
        np.testing.assert_array_equal(held_slots(simulation, kind, 2, edges), held[:2])


def test_the_picture_says_simulated_and_the_hardware(figures, tmp_path):
    simulation = simulate("flashmoe", small_world())
    plot_timeline(simulation, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert axes.get_title().startswith("simulated: flashmoe on 4xH100, 67 tokens per rank, uniform routing")
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"rank {rank}" for rank in range(4)]
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["gate", "dispatch", "gemm0", "gemm1", "combine", "transfer under way"]


def test_the_first_ranks_of_many(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "MAX_RANKS", 2)
    plot_timeline(simulate("flashmoe", small_world()), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == "the first 2 of 4 ranks"
    assert len(axes.get_yticklabels()) == 2


def test_a_world_where_nothing_is_sent(tmp_path):
    plot_timeline(simulate("flashmoe", small_world(num_ranks=1, silent_ranks=(0,))), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_kinds_beyond_those_of_the_kernel_have_colours():
    shown = colours(simulate("scmoe", small_world()))
    assert kinds.DENSE in shown
    assert len(set(shown.values())) == len(shown)


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'flashmoe-numba\[plots\]'"):
        plot_timeline(simulate("flashmoe", small_world()), tmp_path / "a.png")
