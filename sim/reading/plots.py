"""A picture of a simulation: what the slots of each rank did, on one axis of time. Needs matplotlib (extra `plots`).

Each rank is a band as high as its slots of multiprocessors; the kinds of tasks that hold them are stacked in it, as the
mean over `BINS` equal parts of the time. The thin strip above a band is dark while the rank is at either end of a
transfer. A GPU has hundreds of slots, which is why they have no lanes of their own as the kernel's blocks have.

Leaves out: ranks beyond the first `MAX_RANKS`, host and OS block.
"""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from reference.traces import COLOURS

from ..engine.graph import Array
from ..engine.kinds import KIND_NAMES
from ..simulation import Simulation
from .charts import blank, save
from .measures import check_runs, horizon_ns, num_slots, places, sm_runs, transfers
from .steps import levels, means

# The first is also that of RECEIVE, which holds no slots.
OTHERS = ("#D55E00", "#8C6D31", "#7B4173", "#999999", "#637939", "#F0E442")
BINS = 1200
MAX_RANKS = 16
BAND, STRIP = 0.78, 0.06  # heights, of the distance of two ranks


def plot_timeline(simulation: Simulation, file: Path) -> None:
    """Write a PNG, PDF or SVG, by the file's suffix: a band per rank, rank 0 on top, a colour per kind, milliseconds.

    Raises:
        ImportError: matplotlib is missing; names the extra. ValueError: the runs were not kept, or another suffix.
    """
    check_runs(simulation)
    num_ranks = min(simulation.world.num_ranks, MAX_RANKS)
    figure = blank(12, 1.6 + 0.75 * num_ranks)
    axes = figure.add_subplot()
    _draw_bands(axes, simulation, num_ranks)
    _draw_transfers(axes, simulation, num_ranks)
    _label(figure, axes, simulation, num_ranks)
    save(figure, file)


def _draw_bands(axes: Any, simulation: Simulation, num_ranks: int) -> None:
    edges, kinds = _edges(simulation), colours(simulation)
    held = np.array([held_slots(simulation, kind, num_ranks, edges) for kind in kinds]).reshape(-1, num_ranks, BINS)
    top = np.cumsum(held, axis=0)
    top /= max(num_slots(simulation), top.max(initial=0))  # more tasks than slots where engines run beside each other
    foot = np.arange(num_ranks)[:, None] + BAND / 2
    for index, (kind, colour) in enumerate(kinds.items()):
        low = top[index - 1] if index else np.zeros((num_ranks, BINS))
        _fill(axes, edges, foot - BAND * low, foot - BAND * top[index], colour, KIND_NAMES[kind].lower())


def _edges(simulation: Simulation) -> Array:
    return np.linspace(0, horizon_ns(simulation), BINS + 1)


def _fill(axes: Any, edges: Array, low: Array, high: Array, colour: str, label: str) -> None:
    """Fill between two step functions of each rank; `low` and `high` are `[num_ranks, BINS]`."""
    for below, above in zip(low, high, strict=True):
        bounds = (np.append(values, values[-1]) for values in (below, above))
        axes.fill_between(edges / 1e6, *bounds, step="post", color=colour, linewidth=0, label=label)
        label = ""  # of the first rank only


def colours(simulation: Simulation) -> dict[int, str]:
    """A colour for each kind of task that holds slots of multiprocessors, those that all schedules have first."""
    kinds = set(simulation.graph.nodes["kind"][simulation.timeline.run_node[sm_runs(simulation)]].tolist())
    others = [kind for kind in range(len(KIND_NAMES)) if kind not in COLOURS]
    known = COLOURS | dict(zip(others, cycle(OTHERS), strict=False))
    return {kind: colour for kind, colour in known.items() if kind in kinds}


def held_slots(simulation: Simulation, kind: int, num_ranks: int, edges: Array) -> Array:
    """`[num_ranks, len(edges) - 1]`: the mean number of tasks of a kind that hold slots between every two edges."""
    graph, time = simulation.graph, simulation.timeline
    place, runs = places(graph), sm_runs(simulation)
    node = time.run_node[runs]
    runs = runs[(graph.nodes["kind"][node] == kind) & (place[node] < num_ranks)]
    held = (place[time.run_node[runs]], time.run_start_ns[runs], time.run_end_ns[runs], time.run_count[runs])
    steps = levels(*held, num_ranks, horizon_ns(simulation))
    return means(steps, num_ranks, edges)


def _draw_transfers(axes: Any, simulation: Simulation, num_ranks: int) -> None:
    edges = _edges(simulation)
    rank, start, end = transfers(simulation)
    mine = rank < num_ranks
    one = np.ones(mine.sum(), np.int64)
    steps = levels(rank[mine], start[mine], end[mine], one, num_ranks, horizon_ns(simulation))
    share = means(steps._replace(level=steps.level > 0), num_ranks, edges)
    foot = np.broadcast_to(np.arange(num_ranks)[:, None] - BAND / 2 - STRIP, share.shape)
    _fill(axes, edges, foot, foot - STRIP * share, "0.35", "transfer under way")


def _label(figure: Any, axes: Any, simulation: Simulation, num_ranks: int) -> None:
    world = simulation.world
    what = f"{world.routing.num_tokens:,} tokens per rank, {world.routing.name} routing, {world.precision.name}"
    latency = f"{simulation.latency_us:,.0f} us"
    axes.set_title(f"simulated: {simulation.policy} on {world.hardware.name}, {what}: {latency}", fontsize=10)
    axes.set_xlim(0, horizon_ns(simulation) / 1e6)
    axes.set_ylim(num_ranks - 0.5, -0.6)
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)], fontsize=8)
    if num_ranks < world.num_ranks:
        axes.set_ylabel(f"the first {num_ranks} of {world.num_ranks} ranks")
    axes.set_xlabel("ms since the start")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=8, frameon=False, fontsize=9)
