"""The three charts that figures of sweeps are made of: curves, bars, a coloured table. Needs matplotlib.

Numbers come keyed by (line, x); a `Style` gives each line the same colour and marker in all figures of one sweep.
"""

from __future__ import annotations

import string
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reference.pictures import picture_format

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7B4173", "#637939", "#F0E442")
MARKERS = "osD^vP*X<>"
SHARE_COLOURS = ("#56B4E9", "#009E73", "#999999")
EMPTY = "0.93"
DPI = 130
LEAST_FACTOR = 4  # between the ends of an axis that is logarithmic
TICKS = ((20, (1, 1.5, 2, 3, 5, 7)), (500, (1, 2, 5)), (float("inf"), (1,)))  # below that factor, in each decade
MOST_TICKS = 9
BAND_ALPHA = 0.12
LEGEND_ROW = 0.19  # inches


class Cell(NamedTuple):
    """Args:
    lines: the fastest, and those that are as fast within the errors.
    latency_us: of the fastest.
    ratio: how much longer the next one takes; None if there is no other.
    known: whether the errors of both are.
    """

    lines: tuple[str, ...]
    latency_us: float
    ratio: float | None
    known: bool = True


class Style:
    """Colour, marker and short name of each line: its policy, with a letter if lines differ in knobs alone."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.index = {line: number for number, line in enumerate(lines)}
        self.short: dict[str, str] = {}
        for line in lines:
            policy = line.partition(",")[0]
            same = [other for other in lines if other.partition(",")[0] == policy]
            letter = f" {string.ascii_uppercase[same.index(line) % 26]}" if len(same) > 1 else ""
            self.short[line] = policy + letter

    def name(self, line: str) -> str:
        """For legends of figures that have the short names."""
        _, comma, knobs = line.partition(", ")
        return f"{self.short[line]}: {knobs}" if comma else self.short[line]

    def colour(self, line: str) -> str:
        return COLOURS[self.index[line] % len(COLOURS)]

    def marker(self, line: str) -> str:
        return MARKERS[(self.index[line] + self.index[line] // len(COLOURS)) % len(MARKERS)]


Values = Mapping[tuple[Any, ...], float]  # by (line, x)


def curves(
    title: str, x_label: str, panels: Mapping[str, Values], style: Style, errors: Mapping[str, Values] | None = None
) -> Any:
    """A panel for each quantity, side by side, a line for each policy; x in powers of two.

    Args:
        errors: of quantities of which they are known, shares: bands around the lines, where they are known.
    """
    figure = _figure(5.2 * len(panels), 4.6, title)
    lines = sorted({key[0] for values in panels.values() for key in values}, key=style.index.__getitem__)
    for axes, (y_label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for line in lines:
            points = sorted((x, value) for (name, x), value in values.items() if name == line)
            axes.plot(*zip(*points, strict=True), color=style.colour(line), marker=style.marker(line), label=line)
            _draw_band(axes, line, points, (errors or {}).get(y_label, {}), style)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        _scale_x(axes, sorted({key[1] for key in values}))
        _scale_y(axes, list(values.values()))
    legend(figure, axes)
    return figure


def _draw_band(axes: Any, line: str, points: Sequence[tuple[Any, float]], errors: Values, style: Style) -> None:
    """How far off a line may be; a gap where nobody knows."""
    share = np.array([errors.get((line, x), np.nan) for x, _ in points])
    if not np.isnan(share).all():
        at, value = np.array(points, float).T
        look = {"color": style.colour(line), "alpha": BAND_ALPHA, "linewidth": 0}
        axes.fill_between(at, value * (1 - share), value * (1 + share), **look)


def bars(title: str, y_label: str, groups: Mapping[str, Mapping[str, float]]) -> Any:
    """A group of bars for each line, a bar in it for each of `groups`, in percent."""
    lines = sorted(next(iter(groups.values())))
    figure = _figure(max(6.5, 1.6 + 1.4 * len(lines)), 4.6, title)
    axes = figure.add_subplot()
    width = 0.8 / len(groups)
    for number, (name, values) in enumerate(groups.items()):
        place = np.arange(len(lines)) + (number - (len(groups) - 1) / 2) * width
        drawn = axes.bar(place, [100 * values[line] for line in lines], width, color=SHARE_COLOURS[number], label=name)
        axes.bar_label(drawn, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(lines)), [textwrap.fill(line, 16, break_long_words=False) for line in lines], fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(y_label)
    axes.margins(y=0.08)
    legend(figure, axes)
    return figure


def table(title: str, sides: Mapping[str, Sequence[Any]], cells: Mapping[tuple[Any, Any], Cell], style: Style) -> Any:
    """Cells by (x, y); `sides` are the labels of x and of y, each with its values in order."""
    (x_label, xs), (y_label, ys) = sides.items()
    figure = _figure(max(7.0, 2.4 + 1.05 * len(xs)), 2.2 + 0.72 * len(ys), title)
    axes = figure.add_subplot()
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            _draw_cell(axes, column, row, cells.get((x, y)), style)
    axes.set(xlim=(-0.5, len(xs) - 0.5), ylim=(len(ys) - 0.5, -0.5), xlabel=x_label, ylabel=y_label)
    axes.set_xticks(range(len(xs)), [_number(x) for x in xs])
    axes.set_yticks(range(len(ys)), [_number(y) for y in ys])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for line in sorted({line for cell in cells.values() for line in cell.lines}, key=style.index.__getitem__):
        axes.bar(0, 0, color=style.colour(line), label=style.name(line))
    legend(figure, axes)
    return figure


def save(figure: Any, file: Path) -> None:
    """As PNG, PDF or SVG, by the file's suffix; the folder is made.

    Raises:
        ValueError: another suffix.
    """
    kind = picture_format(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format=kind)


def blank(width: float, height: float) -> Any:
    """An empty figure of so many inches.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'flashmoe-numba[plots]'") from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _figure(width: float, height: float, title: str) -> Any:
    figure = blank(width, height)
    wrapped = [part for line in title.split("\n") for part in textwrap.wrap(line, int(11 * width))]
    figure.suptitle("\n".join(wrapped), fontsize=11)
    return figure


def legend(figure: Any, axes: Any) -> None:
    """Below, in as many rows as are needed, for which the figure grows."""
    handles, names = axes.get_legend_handles_labels()
    longest = max(map(len, names))
    columns = max(1, min(len(names), int(figure.get_figwidth() * 11 / (longest + 5))))
    rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * (rows - 1))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _scale_x(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    step = -(-len(ticks) // MOST_TICKS)
    axes.set_xticks(ticks[::step], [_number(tick) for tick in ticks[::step]])
    axes.minorticks_off()


def _scale_y(axes: Any, values: Sequence[float]) -> None:
    """Logarithmic where the values are far apart, with numbers that can be read; else from zero."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if max(values) < LEAST_FACTOR * min(values) or min(values) <= 0:
        axes.set_ylim(0, 1.08 * max(values) or 1)
        return
    axes.set_yscale("log")
    subs = next(subs for factor, subs in TICKS if max(values) < factor * min(values))
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))


def _draw_cell(axes: Any, column: int, row: int, cell: Cell | None, style: Style) -> None:
    """Who is fastest, its time, and how much longer the next one takes; stripes of all colours if several are."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    colours = [style.colour(line) for line in cell.lines] if cell else [EMPTY]
    width = 0.96 / len(colours)
    for number, colour in enumerate(colours):
        left = column - 0.48 + number * width
        axes.add_patch(Rectangle((left, row - 0.47), width, 0.94, facecolor=colour, linewidth=0))
    if cell is None:
        return
    tie = len(colours) > 1
    dark = not tie and np.dot(to_rgb(colours[0]), (0.299, 0.587, 0.114)) < 0.55  # brightness as the eye sees it
    box = {"bbox": {"facecolor": "white", "edgecolor": "none", "boxstyle": "round", "alpha": 0.9}} if tie else {}
    look = {"ha": "center", "va": "center", "fontsize": 8.5, "color": "white" if dark else "black"}
    axes.text(column, row, cell_text(cell, style), **look, **box)


def cell_text(cell: Cell, style: Style) -> str:
    """Three lines."""
    name = "tie" if len(cell.lines) > 1 else style.short[cell.lines[0]]
    ratio = "alone" if cell.ratio is None else f"{cell.ratio:.2f}x{'' if cell.known else ' ?'}"
    return f"{name}\n{cell.latency_us:,.0f} us\n{ratio}"


def _number(value: object) -> str:
    return f"{value:,.10g}" if isinstance(value, (int, float)) else str(value)
