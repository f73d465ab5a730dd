"""A picture of one call: what every block of every rank did, on one axis of time. Needs matplotlib (extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reference.pictures import picture_format
from reference.traces import COLOURS, TRACE_KIND_NAMES, Slice

from .trace import block_name, from_zero

LANE_HEIGHT = 0.42  # half of it, in lanes; the rest is the gap
MOST_NAMED_LANES = 64


def plot_timeline(slices: Sequence[Slice], num_processors: int, file: Path, title: str = "") -> None:
    """Write a PNG, PDF or SVG, by the file's suffix: a lane per block, rank 0 on top, a colour per kind, milliseconds.

    Args:
        title: what ran.

    Raises:
        ImportError: matplotlib is missing; names the extra. ValueError: another suffix.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'flashmoe-numba[plots]'") from error
    lanes = sorted({(task.rank, task.lane) for task in slices})
    figure = Figure(figsize=(12, min(30, 1.5 + 0.3 * len(lanes))), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    _draw_slices(axes, from_zero(slices), lanes)
    _label(figure, axes, lanes, num_processors)
    axes.set_title(title, fontsize=10)
    figure.savefig(file, format=picture_format(file))


def _draw_slices(axes: Any, slices: Sequence[Slice], lanes: Sequence[tuple[int, int]]) -> None:
    from matplotlib.collections import PolyCollection

    row = {lane: number for number, lane in enumerate(lanes)}
    used = {task.kind for task in slices}
    for kind, colour in COLOURS.items():
        if kind not in used:
            continue
        boxes = [_box(task, row[task.rank, task.lane]) for task in slices if task.kind == kind]
        label = TRACE_KIND_NAMES[kind].lower()
        # the edge keeps a slice of a microsecond visible
        axes.add_collection(PolyCollection(boxes, facecolors=colour, edgecolors=colour, linewidths=0.4, label=label))
    axes.set_xlim(0, max((task.end_ns for task in slices), default=1) / 1e6)


def _box(task: Slice, row: int) -> list[tuple[float, float]]:
    """Corners of a slice: milliseconds and lanes."""
    left, right = task.start_ns / 1e6, task.end_ns / 1e6
    top, bottom = row - LANE_HEIGHT, row + LANE_HEIGHT
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _label(figure: Any, axes: Any, lanes: Sequence[tuple[int, int]], num_processors: int) -> None:
    axes.set_ylim(len(lanes) - 0.4, -0.6)
    if len(lanes) <= MOST_NAMED_LANES:
        names = [f"rank {rank}  {block_name(block, num_processors)}" for rank, block in lanes]
        axes.set_yticks(range(len(lanes)), names, fontsize=8)
    for number, (rank, block) in enumerate(lanes):
        if block == 0 and rank % 2 == 0:  # every other rank on grey, so that its blocks are seen to belong together
            axes.axhspan(number - 0.5, number + num_processors + 0.5, color="0.95", zorder=0)
    axes.set_xlabel("ms since the first task began")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if lanes:  # without any there is nothing to name
        figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False, fontsize=9)
