"""Which schedules a map cannot tell apart: those whose simulated times lie within the errors of the simulator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..reading.charts import Cell
from ..reading.places import places

TIE, DOUBT = "; tie: not told apart within the simulator's errors", "; ?: its error is not known"


def row_error(row: dict[str, Any]) -> float | None:
    """What a row of a sweep says of its latency's error: `left_out_error`, a share, of the report or beside it."""
    found = row["report"].get("left_out_error", row.get("left_out_error"))
    return float(found) if isinstance(found, (int, float)) else None


def make_cell(found: Mapping[str, tuple[float, float | None]], judged: bool = True) -> Cell:
    """A cell of a map: the fastest and all that tie with it; equal times in the order of their names.

    It is in doubt where the error of one of these, or of the next one, is not known.

    Args:
        found: latency in microseconds and its error, a share or None, by line.
        judged: some error of the map is known; otherwise nothing is in doubt, as nobody asked.
    """
    placed = places({line: found[line] for line in sorted(found)}, judged)
    best, *others = placed
    ties = [line for line in others if placed[line].tie]
    ratio = placed[others[0]].ratio if others else None
    missing = [found[line][1] is None for line in [*placed][: 2 + len(ties)]]
    return Cell((best, *ties), found[best][0], ratio, known=not (judged and any(missing)))


def explanation(cells: Iterable[Cell]) -> str:
    """What a map's title says of ties and doubts, if it has any."""
    made = list(cells)
    tie = TIE if any(len(cell.lines) > 1 for cell in made) else ""
    return tie + ("" if all(cell.known for cell in made) else DOUBT)
