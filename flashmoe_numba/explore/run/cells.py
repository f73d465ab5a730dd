"""What cells and words of a world's memory mean: the one decoder for reports, waits and histories.

Arrays are known by their names in world.py: `rank 1 segments.dispatch_flag`. Other arrays are told by name and index.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from reference import Layout, MoEConfig
from reference.task_kinds import (
    BACKWARD_NAMES,
    COMBINE,
    DISPATCH,
    GATE,
    GEMM0,
    GEMM1,
    KIND_NAMES,
    NORM_WEIGHTS,
    ROUTER_WEIGHTS,
    SHARED0,
    SHARED1,
    WEIGHTS,
)
from reference.tiles import shared_tiles_n0, tiles_n0

from ...kernel import control, queue, row_tiles, signals
from ...tile_gemm import PLACE_WORDS

# As kernel/queue.py numbers them.
COUNTERS = (
    "HEAD", "TAIL", "GATES_DONE", "GATE_OPEN", "PACKETS_SEEN", "GEMM_TASKS", "HIDDEN_ROWS", "KEPT_ROWS", "TOTAL",
)  # fmt: skip
WORDS = {  # as kernel/row_tiles.py and tile_gemm/rows.py number them
    "streams": ("SEEN", "ARRIVED", "CUT_PACKET", "CUT_SLOT", "WAITING", "TILES", "QUEUED", "spare"),
    "tiles": row_tiles.CutTile._fields,
    "places": ("ROW_IN", "ROW_OUT", "RANK", "KEPT"),
}
MATRICES = ("up", "down", "gate")  # as kernel/weights.py numbers them
CONTROL = {
    control.ABORT: "the abort word",
    control.RECORD: "RECORD",
    control.PROGRESS: "PROGRESS",
    control.SILENT: "SILENT",
    **dict.fromkeys(range(control.RECORD_FIELDS.start, control.RECORD_FIELDS.stop), "RECORD's fields"),
}


def split_name(array: str) -> tuple[int | None, str]:
    """(rank, name without group) of an array: (1, "dispatch_flag") of "rank 1 segments.dispatch_flag"."""
    named = re.fullmatch(r"rank (\d+) (?:\w+\.)?(.+?)(?: of (?:block|call|room) \d+)?", array)
    return (int(named[1]), named[2]) if named else (None, array)


def counter_name(i: int) -> str:
    """Of this word, or of the one that it comes after."""
    number, after = divmod(i, queue.COUNTER_STRIDE)
    return COUNTERS[number % queue.NUM_COUNTERS] + (f" + {after}" if after else "")


def word(array: str, i: int) -> str | None:
    """The name of a word that has one of its own."""
    name = split_name(array)[1]
    if name == "tasks" and i % queue.TASK_WORDS == queue.STAMP:
        return f"the stamp of place {i // queue.TASK_WORDS}"
    if name == "counters":
        return counter_name(i)
    return CONTROL.get(i) if name == "control" else None


def value_of(array: str, value: int) -> str:
    """A flag taken apart; other words are numbers."""
    if split_name(array)[1].endswith("_flag"):
        of_backward = ", a backward" if value >> signals.CALL_SHIFT & signals.LAST_CALL else ""
        return f"(call {value >> signals.EPOCH_SHIFT}{of_backward}, {value & signals.ROWS_MASK} rows)"
    return f"{value}"


class Cells:
    """Tells which cells of an array they are, by the layer's sizes."""

    def __init__(self, config: MoEConfig) -> None:
        c, layout = config, Layout(config)
        rows = c.num_ranks, c.num_experts_per_rank, c.slots, c.hidden
        self._axes: dict[str, tuple[tuple[str, ...], Sequence[int]]] = {
            "dispatch": (("source", "expert", "slot", "column"), rows),
            "result": (("owner", "expert", "slot", "column"), rows),
            "dispatch_flag": (("source", "expert", "flag"), (*rows[:2], 2)),
            "result_flag": (("owner", "expert", "m"), (*rows[:2], layout.row_blocks)),
            "hidden": (("row", "column"), (-1, c.ffn)),
            "x": (("token", "column"), (-1, c.hidden)),
            "y": (("token", "column"), (-1, c.hidden)),
            "up_done": (("source", "expert", "m"), (*rows[:2], layout.row_blocks)),
            "down_done": (("source", "expert", "m"), (*rows[:2], layout.row_blocks)),
            "chunk_done": (("source", "expert", "m"), (*rows[:2], layout.row_blocks)),
            "needs_left": (("token block",), (-1,)),
            "shared_hidden": (("token", "column"), (-1, max(c.shared_ffn, 1))),
            "shared_results": (("token", "column"), (-1, c.hidden)),
            "shared_factors": (("token",), (-1,)),
            "shared_up_done": (("m",), (-1,)),
            "shared_down_done": (("m",), (-1,)),
        } | _backward_axes(c)
        self._books: dict[str, tuple[tuple[str, ...], Sequence[int]]] = {
            "seen": (("source", "expert"), rows[:2]),
            "rows": (("source", "expert"), rows[:2]),
            "begun": (("source", "expert"), rows[:2]),
            "streams": (("expert", "word"), (-1, row_tiles.STREAM_WORDS)),
            "arrived": (("expert", "packet"), (-1, c.num_ranks)),
            "cut": (("expert", "tile"), (-1, c.num_ranks * layout.row_blocks)),
            "tiles": (("source", "expert", "m", "word"), (*rows[:2], layout.row_blocks, row_tiles.TILE_WORDS)),
            "places": (("row", "word"), (-1, PLACE_WORDS)),
        }

    def tell(self, array: str, cells: Mapping[int, object], brief: bool = False) -> str:
        """Cells, by index, with their values where these are known: one phrase.

        Args:
            brief: the name is enough, where cells have none of their own.
        """
        name = split_name(array)[1]
        if name == "tasks":
            return "; ".join(self._place(place, cells) for place in sorted({i // queue.TASK_WORDS for i in cells}))
        if name in ("counters", "control"):
            names = dict.fromkeys(word(array, i) or f"{name}[{i}]" for i in cells)
            return ", ".join(names) if len(names) < len(COUNTERS) else f"one set of {name}"
        if name in self._axes or (name in self._books and not brief):
            return f"{name}({self._coordinates(name, sorted(cells))})"
        return name if brief else f"{name}[{spans(cells)}]"

    def are_books(self, array: str) -> bool:
        """Is it what a rank keeps for itself, not data, signals, tasks or counters?"""
        rank, name = split_name(array)
        return rank is not None and name not in self._axes and name not in ("tasks", "counters", "control")

    def _coordinates(self, name: str, indices: list[int]) -> str:
        """`source 0, expert 1, slots 0-1`: a column is named only where a row is not whole."""
        axes, shape = self._axes.get(name) or self._books[name]
        strides = [int(np.prod(shape[k + 1 :])) for k in range(len(shape))]
        parts = []
        for axis, stride, size in zip(axes, strides, shape, strict=True):
            seen = {i // stride % size if size > 0 else i // stride for i in indices}
            if axis == "word":
                parts.append(", ".join(WORDS[name][i] for i in sorted(seen)))
            elif axis != "column" or len(seen) < size:
                parts.append(f"{axis}{'s' if len(seen) > 1 else ''} {spans(seen)}")
        return ", ".join(parts)

    def _place(self, place: int, cells: Mapping[int, object]) -> str:
        who, where = (cells.get(place * queue.TASK_WORDS + word) for word in (queue.WHO, queue.WHERE))
        if not isinstance(who, int) or not isinstance(where, int):
            return f"place {place}"
        return f"place {place}: {task_text(*queue.task_of(who, where))}"


def _backward_axes(c: MoEConfig) -> dict[str, tuple[tuple[str, ...], Sequence[int]]]:
    """Of what only calls that are kept, and backwards, have."""
    slots = c.num_ranks, c.num_experts_per_rank, c.slots
    ups, shared, shared_ups = c.expert_kind.num_ups * c.ffn, c.shared_ffn, c.shared_kind.num_ups * c.shared_ffn
    of_pairs = ("token", "choice"), (-1, c.num_topk)
    of_rows = {"kept_rows": c.hidden, "dy_rows": c.hidden, "kept_ups": ups, "up_gradients": ups, "active": c.ffn}
    of_tokens = {"dy": c.hidden, "dx": c.hidden, "router_rows": c.hidden, "shared_active": shared}
    of_tokens |= {"shared_ups": shared_ups, "shared_up_gradients": shared_ups}
    return {
        "again": (("source", "expert", "slot", "column"), (*slots, c.hidden)),
        "factors": (("source", "expert", "slot"), slots),
        "dots": (("owner", "expert", "slot"), slots),
        "row_factors": (("row",), (-1,)),
        "row_dots": (("row", "n"), (-1, tiles_n0(c))),
        "shared_dots": (("token", "n"), (-1, shared_tiles_n0(c))),
        "gate_gradients": (("token",), (-1,)),
        "weight_gradients": of_pairs,
        "norms": of_pairs,
        "norm_dots": of_pairs,
        "kept_results": (("token", "choice", "column"), (-1, c.num_topk, c.hidden)),
        "logits_gradient": (("token", "expert"), (-1, c.num_choices)),
        "weights_left": (("expert",), (-1,)),
        **{name: (("row", "column"), (-1, columns)) for name, columns in of_rows.items()},
        **{name: (("token", "column"), (-1, max(columns, 1))) for name, columns in of_tokens.items()},
        "up": (("expert", "row", "column"), (-1, ups, c.hidden)),
        "down": (("expert", "row", "column"), (-1, c.hidden, c.ffn)),
        "router": (("expert", "column"), (-1, c.hidden)),
    }


def task_text(kind: int, peer: int, expert: int, m: int, n: int) -> str:
    """A task with the indices that its kind has."""
    if kind in (GATE, COMBINE):
        return f"{KIND_NAMES[kind]}(token block {m})"
    if kind == DISPATCH:
        return f"DISPATCH(owner {peer}, expert {expert})"
    if kind in (GEMM0, GEMM1):
        return f"{KIND_NAMES[kind]}(source {peer}, expert {expert}, m {m}, n {n})"
    if kind in (SHARED0, SHARED1):
        return f"{KIND_NAMES[kind]}(m {m}, n {n})"
    if kind in BACKWARD_NAMES:
        of = f"expert {expert}'s {MATRICES[peer]}" if kind == WEIGHTS else MATRICES[peer]
        return f"{BACKWARD_NAMES[kind]}({'' if kind in (ROUTER_WEIGHTS, NORM_WEIGHTS) else f'{of}, '}m {m}, n {n})"
    return f"a task of kind {kind}"


def spans(numbers: Iterable[int]) -> str:
    """`0-2, 5`."""
    ordered = sorted(set(numbers))
    runs = itertools.groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in ends)
