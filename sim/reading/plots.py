"""A picture of a simulation: what each rank did, on one axis of time. Needs matplotlib (extra `plots`).

Each rank is a band as high as its slots of multiprocessors; the kinds of tasks that hold them are stacked in it, as the
mean over `BINS` equal parts of the time. Where engines of one multiprocessor run beside each other (loads, epilogues),
they share its slot. The thin strips above a band are the rank's host, its OS block, and transfers: dark while the rank
is at either end of one. A GPU has hundreds of slots, which is why they have no lanes of their own as the kernel's
blocks have.

Leaves out: ranks beyond the first `MAX_RANKS`, meetings, copies that hold no slots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..drafting.machine import HOST, OS_BLOCK, SM_SLOTS
from ..engine.graph import Array
from ..simulation import Simulation
from ..world.world import FORWARD
from .bands import Band, each_rank, server_bands
from .charts import blank, legend, save
from .measures import check_runs, horizon_ns, transfers
from .palette import COLOUR_OF_KIND
from .steps import levels, means

BINS = 1200
MAX_RANKS = 16
TRANSFERS = "transfers"
TRANSFER_COLOUR = "0.35"
SHOWN = (HOST, OS_BLOCK, SM_SLOTS)  # of the bands, beside transfers
BAND, STRIP, GAP = 0.55, 0.065, 0.035  # heights, of the distance of two ranks, which is an inch


def plot_timeline(simulation: Simulation, file: Path | str, layer: str = "") -> None:
    """Write a PNG, PDF or SVG, by the file's suffix: a band per rank, rank 0 on top, a colour per kind, milliseconds.

    Args:
        layer: what the title calls the layer, beside its sizes.

    Raises:
        ImportError: matplotlib is missing; names the extra. ValueError: the runs were not kept, or another suffix.
    """
    check_runs(simulation)
    num_ranks = min(simulation.world.num_ranks, MAX_RANKS)
    figure = blank(12, 2.1 + num_ranks)
    axes = figure.add_subplot()
    edges = np.linspace(0, horizon_ns(simulation), BINS + 1)
    found = server_bands(simulation, each_rank(range(num_ranks), simulation.world.num_ranks))
    drawn = [*(band for band in found if band.name in SHOWN), _transfers(simulation, num_ranks)]
    feet = _feet([band.name for band in drawn])
    for kind, colour in _colours(drawn).items():
        axes.bar(0, 0, color=colour, label=kind.lower())
    for band in drawn:
        _draw(axes, band, feet[band.name], num_ranks, edges)
    _label(axes, simulation, layer, feet)
    legend(figure, axes)
    save(figure, Path(file))


def _feet(names: list[str]) -> dict[str, float]:
    """Where bands end, down from the middle of their rank, so that it is the middle of the slots: strips lie above."""
    strips = [name for name in names if name != SM_SLOTS]
    top = -BAND / 2 - len(strips) * (STRIP + GAP)
    return {name: top + number * (STRIP + GAP) + STRIP for number, name in enumerate(strips)} | {SM_SLOTS: BAND / 2}


def _colours(drawn: list[Band]) -> dict[str, str]:
    """Of the kinds that occur, those of all schedules first, and of what the strip of transfers shows."""
    used = {part for band in drawn for part in band.parts}
    colours = COLOUR_OF_KIND | {TRANSFERS: TRANSFER_COLOUR}
    return {kind: colour for kind, colour in colours.items() if kind in used}


def _transfers(simulation: Simulation, num_ranks: int) -> Band:
    """1 while a rank is at either end of a transfer."""
    rank, start, end = transfers(simulation)
    mine = rank < num_ranks
    one = np.ones(mine.sum(), np.int64)
    steps = levels(rank[mine], start[mine], end[mine], one, num_ranks, horizon_ns(simulation))
    return Band(TRANSFERS, 1, {TRANSFERS: steps._replace(level=steps.level > 0)})


def stacked(band: Band, num_groups: int, edges: Array) -> Array:
    """`[num_parts, num_groups, len(edges) - 1]`: the share of a band that each part fills, at most 1 together."""
    held = np.array([means(steps, num_groups, edges) for steps in band.parts.values()]) / band.full
    shares: Array = held / np.maximum(1, held.sum(axis=0))
    return shares


def _draw(axes: Any, band: Band, foot_of: float, num_ranks: int, edges: Array) -> None:
    """The parts of a band of each rank on each other."""
    height = BAND if band.name == SM_SLOTS else STRIP
    foot = np.broadcast_to(np.arange(num_ranks)[:, None] + foot_of, (num_ranks, BINS))
    for lane in foot[:, 0]:
        axes.fill_between(edges[[0, -1]] / 1e6, lane - height, lane, color="0.95", linewidth=0, zorder=0)
    for part, share in zip(band.parts, stacked(band, num_ranks, edges), strict=True):
        head = foot - height * share
        colour = COLOUR_OF_KIND.get(part, TRANSFER_COLOUR)
        for below, above in zip(foot, head, strict=True):
            bounds = (np.append(values, values[-1]) for values in (below, above))
            axes.fill_between(edges / 1e6, *bounds, step="post", color=colour, linewidth=0)
        foot = head


def _label(axes: Any, simulation: Simulation, layer: str, feet: dict[str, float]) -> None:
    world = simulation.world
    num_ranks = min(world.num_ranks, MAX_RANKS)
    axes.set_title(title(simulation, layer), fontsize=10)
    axes.set_xlim(0, horizon_ns(simulation) / 1e6)
    axes.set_ylim(num_ranks - 0.6, min(feet.values()) - STRIP - GAP)
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)], fontsize=9)
    strips = [name for name in feet if name != SM_SLOTS]
    places = [rank + feet[name] - STRIP / 2 for rank in range(num_ranks) for name in strips]
    axes.set_yticks(places, strips * num_ranks, fontsize=6, minor=True)
    some = "" if num_ranks == world.num_ranks else f"\nthe first {num_ranks} of {world.num_ranks} ranks"
    axes.set_ylabel(f"slots held by tasks{some}")
    axes.set_xlabel("ms since the start")
    axes.tick_params(axis="y", which="both", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def title(simulation: Simulation, layer: str) -> str:
    """What was simulated, in two lines, and how long it takes."""
    world, config = simulation.world, simulation.world.config
    gated = " gated" if config.expert_kind.gated else ""
    sizes = f"hidden {config.hidden}, ffn {config.ffn}{gated}, {config.num_experts} experts, top-{config.num_topk}"
    what = f"{world.routing.num_tokens:,} tokens per rank, {world.routing.name} routing, {world.precision.name}"
    what += "" if world.passes == FORWARD else f", {world.passes}"
    first = f"simulated: {simulation.policy} on {world.hardware.name}: {simulation.latency_us:,.0f} us"
    return f"{first}\n{f'{layer}, ' if layer else ''}{sizes}, {what}"
