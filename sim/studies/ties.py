"""Which schedules a map cannot tell apart: those whose simulated times lie within the errors of the simulator."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..reading.charts import Cell

TIE, DOUBT = "; tie: not told apart within the simulator's errors", "; ?: its error is not known"


def row_error(row: dict[str, Any]) -> float | None:
    """What a row of a sweep says of its latency's error: `left_out_error`, a share, of the report or beside it."""
    found = row["report"].get("left_out_error", row.get("left_out_error"))
    return float(found) if isinstance(found, (int, float)) else None


def make_cell(found: dict[str, tuple[float, float | None]], judged: bool = True) -> Cell:
    """A cell of a map: a tie of the fastest and of all whose shortest time is not beyond the longest of the fastest.

    It is in doubt where the error of one of these, or of the next one, is not known.

    Args:
        found: latency in microseconds and its error, a share or None, by line.
        judged: some error of the map is known; otherwise nothing is in doubt, as nobody asked.
    """
    ranked = sorted(found, key=lambda line: (found[line][0], line))
    best, best_error = found[ranked[0]]
    longest = best * (1 + (best_error or 0))
    ties = [line for line in ranked[1:] if found[line][0] * (1 - (found[line][1] or 0)) < longest]
    ratio = found[ranked[1]][0] / best if len(ranked) > 1 else None
    missing = [found[line][1] is None for line in ranked[: 2 + len(ties)]]
    return Cell((ranked[0], *ties), best, ratio, known=not (judged and any(missing)))


def explanation(cells: Iterable[Cell]) -> str:
    """What a map's title says of ties and doubts, if it has any."""
    made = list(cells)
    tie = TIE if any(len(cell.lines) > 1 for cell in made) else ""
    return tie + ("" if all(cell.known for cell in made) else DOUBT)
