"""Step functions as lists of bounded length, for a page.

A series is exact, `{"at": [...], "level": [...]}`, where it has few steps: `level[i]` holds from nanosecond
`sum(at[: i + 1])` on, the last to the end. With more steps than are allowed it is folded: {"every": ns, ...}
has the means over equal parts of the time instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...engine.graph import Array
from ..steps import Steps, means

Series = dict[str, Any]
DIGITS = 3  # of a mean, beside the whole part


def series(steps: Steps, group: int, scale: float, most: int) -> Series:
    """The levels of one group, times `scale`, as at most `most` of them."""
    low, high = np.searchsorted(steps.group, (group, group + 1))
    left, level = steps.left[low:high], steps.level[low:high]
    new = np.flatnonzero(np.append(True, level[1:] != level[:-1]))
    if len(new) <= most:
        return {"at": np.diff(left[new], prepend=0).tolist(), "level": _short(level[new] * scale)}
    horizon = int(steps.right[high - 1])
    mine = Steps(np.zeros(high - low, np.int64), left, steps.right[low:high], level)
    folded = means(mine, 1, np.linspace(0, horizon, most + 1))[0]
    return {"every": horizon / most, "level": _short(folded * scale)}


def _short(values: Array) -> list[float]:
    """Whole numbers without a point, which a page has many of."""
    return [int(value) if value == int(value) else round(value, DIGITS) for value in values.tolist()]
