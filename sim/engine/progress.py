"""How far the run is that goes on in this process, for another thread that tells people.

Invariant: nothing that a run computes depends on it. Leaves out: several runs at a time, of which one is told of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .graph import Array

_running: list[tuple[int, Array]] = []  # the last one is told of


@contextmanager
def watched(total: int, undone: Array) -> Iterator[None]:
    """A run of `total` tasks goes on inside; `undone` `[num_nodes]` is kept up to date, tasks of each node."""
    _running.append((total, undone))
    try:
        yield
    finally:
        _running.pop()


def tasks_done() -> tuple[int, int] | None:
    """Tasks that are complete, and all there are; None if nothing runs. A pass over all nodes: ask seldom."""
    for total, undone in _running[-1:]:
        return total - int(undone.sum(dtype=np.int64)), total
    return None
