"""Pictures of simulations: the bands hold what the tasks held, and the title says that it is simulated."""

import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from policy_worlds import on_few_sms, small_world

from sim.policies import POLICY_NAMES
from sim.reading import plots
from sim.reading.bands import each_rank, server_bands
from sim.reading.plots import plot_timeline, stacked
from sim.reading.report import report
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
def test_bands_are_as_full_as_the_report_says(policy):
    """Also where engines of one multiprocessor run beside each other, as in sonic, and all of them are busy."""
    simulation = simulate(policy, on_few_sms(small_world(num_tokens=400, ffn=800), 30))
    horizon = simulation.timeline.makespan_ns
    (band,) = [band for band in server_bands(simulation, each_rank(range(4), 4)) if band.name == "SM slots"]
    moments = {0, horizon}.union(*(steps.left.tolist() for steps in band.parts.values()))
    edges = np.array(sorted(moments))
    shares = stacked(band, 4, edges)
    assert shares.shape == (len(band.parts), 4, len(edges) - 1)
    assert shares.min() >= 0
    assert shares.sum(axis=0).max() <= 1 + 1e-12
    resident = (shares.sum(axis=0) * np.diff(edges)).sum() / (4 * horizon)
    assert resident == pytest.approx(report(simulation).resident)


def tick_labels(axes, minor=False):
    return [label.get_text() for label in axes.get_yticklabels(minor=minor)]


def test_the_picture_says_what_was_simulated_and_names_all_it_draws(figures, tmp_path):
    plot_timeline(simulate("flashmoe", small_world()), tmp_path / "a.png", "my layer")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    first, second = axes.get_title().split("\n")
    assert first.startswith("simulated: flashmoe on 4xH100: ")
    sizes = "my layer, hidden 192, ffn 80 gated, 8 experts, top-2"
    assert second == f"{sizes}, 67 tokens per rank, uniform routing, bfloat16"
    assert tick_labels(axes) == [f"rank {rank}" for rank in range(4)]
    assert tick_labels(axes, minor=True) == ["host", "OS block", "transfers"] * 4
    assert axes.get_ylabel() == "slots held by tasks"
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["gate", "dispatch", "gemm0", "gemm1", "combine", "receive", "launch", "transfers"]


def test_the_first_ranks_of_many(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "MAX_RANKS", 2)
    plot_timeline(simulate("flashmoe", small_world()), tmp_path / "a.png")
    (axes,) = figures[0].axes
    assert axes.get_ylabel().endswith("\nthe first 2 of 4 ranks")
    assert tick_labels(axes) == ["rank 0", "rank 1"]


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_nothing_is_cut_and_nothing_overlaps(figures, tmp_path, num_ranks):
    plot_timeline(simulate("deepep", small_world(num_ranks=num_ranks)), tmp_path / "a.png", "a layer with a long name")
    (figure,) = figures
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    labels = [*axes.get_yticklabels(), *axes.get_yticklabels(minor=True)]
    boxes = [label.get_window_extent() for label in sorted(labels, key=lambda label: label.get_position()[1])]
    assert not any(one.overlaps(other) for one, other in pairwise(boxes))
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, *figure.legends[0].get_texts()]
    for box in [*boxes, *(text.get_window_extent() for text in texts)]:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_a_world_where_nothing_is_sent(tmp_path):
    plot_timeline(simulate("flashmoe", small_world(num_ranks=1, silent_ranks=(0,))), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'flashmoe-numba\[plots\]'"):
        plot_timeline(simulate("flashmoe", small_world()), tmp_path / "a.png")
