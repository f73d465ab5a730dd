"""Figures of a sweep, from its stored rows alone. Needs matplotlib (extra `plots`).

    over_tokens, over_experts    latency and throughput, a line per policy
    over_gpus                    the same with as many experts over all GPUs
    weak_scaling                 the same with as many experts on each GPU, and overlap efficiency T(2) / T(N)
    utilisation                  tensor-busy, useful and resident shares of each policy, at the most tokens
    fastest_over_experts, fastest_over_routing, fastest_over_hardware
                                 crossover maps: which policy is fastest, and how much longer the next one takes

A line is a policy with the knobs that were changed. What a figure does not vary is the same for all its rows and stands
in its title; other choices of it are figures of their own. Of several seeds the median counts. Combinations that cannot
be leave gaps. Where errors of the simulator are given, latencies have bands as wide, and a map shows as a tie what they
do not tell apart: policies whose shortest time by their error is not beyond the longest of the fastest. Otherwise, of
equally fast policies, a map shows the first by name.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..reading.charts import Style, bars, curves, save, table
from ..world.machine_names import gpu_kind
from .captions import UNITS, in_file_name, ordered, title
from .index import write_index
from .point import LATER
from .sweep import Row
from .ties import explanation, make_cell, row_error

FIXED: tuple[str, ...] = ("hardware", "preset", "hidden", "ffn", "gated", "experts", "topk", "capacity_factor")
FIXED += ("tokens", "routing", "precision", *LATER)
LATENCY = "latency, us"
BANDS = "; bands: errors at measurements that no fit saw"
SHARES = {
    "tensor-busy, of the peak": "tensor_busy",
    "useful, of the peak": "useful",
    "resident, of slot time": "resident",
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure to draw.

    Args:
        name: of its file, without what distinguishes it from others of its kind.
        common: what its rows have in common.
    """

    name: str
    rows: Sequence[Row]
    common: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of figure.

    Args:
        varies: what its rows must differ in; nothing else of `FIXED` may.
        lines: the fewest policies.
        free: what they may differ in as well.
        instead: names in place of those of `FIXED`.
    """

    name: str
    draw: Callable[[Kind, Figure, Style], Any]
    varies: tuple[str, ...]
    lines: int = 1
    free: tuple[str, ...] = ()
    instead: dict[str, str] = field(default_factory=dict)


def draw_figures(
    rows: Iterable[Row], folder: Path, most: int = 12, error: Callable[[Row], float | None] | None = None
) -> tuple[list[Path], list[str]]:
    """Write the figures that the rows are enough for, as PNG, and a page with all of them, `index.html`.

    Args:
        most: figures of a kind; those with the most rows are drawn.
        error: of a row's latency, a share in [0, 1), None where it is not known; by default what the row says itself
            (`row_error`). Without any, maps have no ties.

    Returns:
        The files, and a sentence for each kind of which some or all are not drawn.

    Raises:
        ImportError: matplotlib is missing; names the extra.
    """
    usable = _prepared([row for row in rows if "report" in row], error or row_error)
    style = Style(sorted({row["line"] for row in usable}))
    titles: dict[Path, str] = {}
    notes: list[str] = []
    for kind in KINDS:
        figures = _figures(usable, kind)
        for figure in figures[:most]:
            file = folder / f"{figure.name}.png"
            drawn = kind.draw(kind, figure, style)
            save(drawn, file)
            titles[file] = drawn.get_suptitle()
        if not figures:
            notes.append(f"no {kind.name}: {_reason(usable, kind)}")
        elif len(figures) > most:
            notes.append(
                f"{kind.name}: {most} of {len(figures)}, those with the most rows; choose rows (--where) for others"
            )
    if titles:
        write_index(folder, titles, notes)
    return [*titles], notes


def _prepared(rows: Sequence[Row], error: Callable[[Row], float | None]) -> list[Row]:
    """The rows, with what figures ask for beside their parameters. Knobs that all have are no part of a line's name."""
    common = set.intersection(*(_knobs(row) for row in rows)) if rows else set()
    return [LATER | _with_names(row, common) | {"error": error(row)} for row in rows]


def _with_names(row: Row, common: set[str]) -> Row:
    line = ", ".join([row["policy"], *sorted(_knobs(row) - common)])
    names = {"line": line, "common_knobs": ", ".join(sorted(common)), "gpu": gpu_kind(row["hardware"])}
    return row | names | {"gpus": row["ranks"], "experts_per_gpu": row["experts"] / row["ranks"]}


def _knobs(row: Row) -> set[str]:
    return {f"{name}={_plain(value)}" for name, value in row["knobs"].items()}


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# ---- which figures


def _figures(rows: Sequence[Row], kind: Kind) -> list[Figure]:
    """All of a kind, those with the most rows first."""
    common = [kind.instead.get(name, name) for name in FIXED if name not in (*kind.varies, *kind.free)]
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in common)].append(row)
    different = [name for name, values in zip(common, zip(*groups, strict=True), strict=False) if len({*values}) > 1]
    found = []
    for values, group in groups.items():
        if _lacks(group, kind) is None:
            named = dict(zip(common, values, strict=True))
            file = "_".join([kind.name, *(in_file_name(name, named[name]) for name in different)])
            found.append(Figure(name=file, rows=group, common=named))
    return sorted(found, key=lambda figure: (-len(figure.rows), figure.name))


def _lacks(rows: Sequence[Row], kind: Kind) -> str | None:
    """What keeps these rows from being a figure: a parameter of which they have one value only."""
    for name in kind.varies:
        if len({row[name] for row in rows}) < 2:
            return name
    return "policy" if len({row["line"] for row in rows}) < kind.lines else None


def _reason(rows: Sequence[Row], kind: Kind) -> str:
    if not rows:
        return "there are no rows with a report"
    lacking = _lacks(rows, kind)
    if lacking is None:
        return f"no rows differ in {' and '.join(kind.varies)} alone"
    values = {row["line" if lacking == "policy" else lacking] for row in rows}
    return f"it needs several values of {lacking}, and all rows have {values.pop()}"


# ---- how they are drawn


def _values(rows: Iterable[Row], x: Sequence[str], value: str) -> dict[tuple[Any, ...], float]:
    """The median of `report[value]` by line and the parameters `x`."""
    found = defaultdict(list)
    for row in rows:
        found[(row["line"], *(row[name] for name in x))].append(float(row["report"][value]))
    return {key: median(values) for key, values in found.items()}


def _draw_curves(kind: Kind, figure: Figure, style: Style) -> Any:
    (x,) = kind.varies
    rows = _one_machine_each(figure.rows) if x == "gpus" else figure.rows
    latency = _values(rows, (x,), "latency_us")
    millions = {key: value / 1e6 for key, value in _values(rows, (x,), "tokens_per_s").items()}
    panels = {LATENCY: latency, "throughput, million tokens/s": millions}
    if kind.name == "weak_scaling":
        efficiency = {key: latency[key[0], 2] / value for key, value in latency.items() if (key[0], 2) in latency}
        panels |= {"overlap efficiency, T(2) / T(N)": efficiency} if efficiency else {}
    errors = {(row["line"], row[x]): row["error"] for row in rows if row["error"] is not None}
    said = title(f"Latency and throughput over {UNITS[x]}", figure.common, figure.rows) + (BANDS if errors else "")
    return curves(said, UNITS[x], panels, style, {LATENCY: errors})


def _one_machine_each(rows: Sequence[Row]) -> list[Row]:
    """Of several machines with as many GPUs, the one with the fewest nodes."""
    name = {row["gpus"]: row["hardware"] for row in sorted(rows, key=lambda row: -row["hardware"].count("x"))}
    return [row for row in rows if row["hardware"] == name[row["gpus"]]]


def _draw_bars(_: Kind, figure: Figure, style: Style) -> Any:
    tokens = max(row["tokens"] for row in figure.rows)
    rows = [row for row in figure.rows if row["tokens"] == tokens]
    shares = {
        name: {key[0]: value for key, value in _values(rows, (), field).items()} for name, field in SHARES.items()
    }
    return bars(title("Utilisation", figure.common | {"tokens": tokens}, figure.rows), "share, %", shares)


def _draw_table(kind: Kind, figure: Figure, style: Style) -> Any:
    y, x = kind.varies
    latency = _values(figure.rows, (x, y), "latency_us")
    error = {(row["line"], row[x], row[y]): row["error"] for row in figure.rows}
    cells, judged = {}, any(value is not None for value in error.values())
    for place in {key[1:] for key in latency}:
        found = {key[0]: (value, error[key]) for key, value in latency.items() if key[1:] == place}
        cells[place] = make_cell(found, judged)
    said = title("Fastest policy, its time, ratio of the next one", figure.common, figure.rows)
    said += explanation(cells.values())
    sides = {UNITS.get(name, name): ordered(figure.rows, name) for name in (x, y)}
    return table(said, sides, cells, style)


PER_GPU = {"hardware": "gpu", "experts": "experts_per_gpu"}
KINDS = (
    Kind(name="over_tokens", draw=_draw_curves, varies=("tokens",)),
    Kind(name="over_experts", draw=_draw_curves, varies=("experts",)),
    Kind(name="over_gpus", draw=_draw_curves, varies=("gpus",), instead={"hardware": "gpu"}),
    Kind(name="weak_scaling", draw=_draw_curves, varies=("gpus",), instead=PER_GPU),
    Kind(name="utilisation", draw=_draw_bars, varies=(), free=("tokens",)),
    Kind(name="fastest_over_experts", draw=_draw_table, varies=("experts", "tokens"), lines=2),
    Kind(name="fastest_over_routing", draw=_draw_table, varies=("routing", "tokens"), lines=2),
    Kind(name="fastest_over_hardware", draw=_draw_table, varies=("hardware", "tokens"), lines=2),
)
