"""Delta debugging: a list that fails, made as short as leaving out parts of it can make it.

Source: Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", IEEE TSE 2002, section 3 (ddmin).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def ddmin(items: Sequence[Item], fails: Callable[[Sequence[Item]], bool]) -> list[Item]:
    """A part of `items` that fails, and of which no single item can be left out.

    Args:
        items: fail, all together.
        fails: of any part of them, in order; a part that fails may have parts that do not.
    """
    if not items or fails([]):
        return []
    kept, num_parts = list(items), 2
    while len(kept) > 1:
        parts = _split(kept, num_parts)
        rests = [[item for j, part in enumerate(parts) if j != i for item in part] for i in range(num_parts)]
        part = next((part for part in parts if fails(part)), None)
        rest = None if part else next((rest for rest in rests if num_parts > 2 and fails(rest)), None)
        if part:
            kept, num_parts = part, 2
        elif rest:
            kept, num_parts = rest, num_parts - 1
        elif num_parts == len(kept):
            break
        else:
            num_parts = min(2 * num_parts, len(kept))
    return kept


def _split(items: list[Item], num_parts: int) -> list[list[Item]]:
    ends = [len(items) * i // num_parts for i in range(num_parts + 1)]
    return [items[start:end] for start, end in itertools.pairwise(ends)]
