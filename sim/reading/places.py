"""Which of several simulations is fastest, and which cannot be told apart from it.

A time with its error is a range. Those whose range reaches into that of the fastest tie with it. An error that is not
known counts as none, and whether there is a tie is then not known either, unless the times alone say so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

Name = TypeVar("Name")
Row = Mapping[str, Any]  # the fields of a `Report`, and what is said beside it


class Place(NamedTuple):
    """One of several that are compared.

    Args:
        ratio: its time over the shortest.
        tie: it is not told apart from the fastest, and the fastest not from another; None: nobody knows, because the
            error of one of the two is not known. The fastest is told apart from all if it is from the next one.
    """

    ratio: float
    tie: bool | None


def places(found: Mapping[Name, tuple[float, float | None]], judged: bool = True) -> dict[Name, Place]:
    """The place of each, the fastest first, equal times in the order given.

    Args:
        found: latency and its error, a share or None, of at least one.
        judged: errors are known of some, maybe elsewhere; otherwise nothing is in doubt, as nobody asked.
    """
    first, *others = sorted(found, key=lambda name: found[name][0])
    best, best_error = found[first]
    longest = best * (1 + (best_error or 0))
    ties: dict[Name, bool | None] = {}
    for name in others:
        latency, error = found[name]
        doubt = None if judged and None in (error, best_error) else False
        ties[name] = latency * (1 - (error or 0)) < longest or doubt
    next_one = ties[others[0]] if others else False
    ties = {first: True if True in ties.values() else next_one} | ties
    return {name: Place(found[name][0] / best if best else 1.0, tie) for name, tie in ties.items()}


def compared(rows: Sequence[Row], world: Callable[[Row], object]) -> list[dict[str, Any]]:
    """The rows, with `over_fastest` and `tie`, a `Place`, where several are of the same world.

    Args:
        world: of a row, what those have in common that are compared.
    """
    groups: dict[object, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(world(row), []).append(index)
    judged = any(_error(row) is not None for row in rows)
    found: dict[int, Place] = {}
    for group in groups.values():
        if len(group) > 1:
            found |= places({at: (rows[at]["latency_us"], _error(rows[at])) for at in group}, judged)
    said = {at: {"over_fastest": place.ratio, "tie": place.tie} for at, place in found.items()}
    return [{**row, **said.get(at, {})} for at, row in enumerate(rows)]


def _error(row: Row) -> float | None:
    """A share; words that somebody put there say nothing."""
    error = row["left_out_error"]
    return error if isinstance(error, float) else None
