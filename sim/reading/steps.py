"""How many intervals are open at each moment, by group: what shares and counters of a timeline are made of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..engine.graph import Array


class Steps(NamedTuple):
    """A step function of time for each group, ordered by group and time: `level` holds in `[left, right)`.

    The steps of a group cover `[0, horizon)` and none is empty.
    """

    group: Array
    left: Array
    right: Array
    level: Array


def levels(group: Array, start: Array, end: Array, weight: Array, num_groups: int, horizon: int) -> Steps:
    """The summed weights of the intervals that are open.

    Args:
        group, start, end: `[num_intervals]`, each in `[0, horizon]`.
        weight: `[num_intervals]` integers.
    """
    every = np.arange(num_groups)
    groups = np.concatenate([group, group, every, every])
    time = np.concatenate([start, end, np.zeros(num_groups, np.int64), np.full(num_groups, horizon)])
    change = np.concatenate([weight, -weight, np.zeros(2 * num_groups, np.int64)])
    order = np.argsort(groups * np.int64(horizon + 1) + time, kind="stable")  # by group, then time
    groups, time, level = groups[order], time[order], np.cumsum(change[order], dtype=np.int64)
    kept = np.flatnonzero((groups[1:] == groups[:-1]) & (time[1:] > time[:-1]))
    return Steps(groups[kept], time[kept], time[kept + 1], level[kept])


def means(steps: Steps, num_groups: int, edges: Array) -> Array:
    """`[num_groups, len(edges) - 1]`: the mean level of each group between every two edges, which ascend."""
    result = np.empty((num_groups, len(edges) - 1))
    begin = np.searchsorted(steps.group, np.arange(num_groups + 1))
    for group in range(num_groups):
        mine = slice(begin[group], begin[group + 1])
        left, right, level = steps.left[mine], steps.right[mine], steps.level[mine]
        area = np.concatenate([[0], np.cumsum(level * (right - left))])  # up to each bound: linear in between
        result[group] = np.diff(np.interp(edges, np.append(left, right[-1:]), area)) / np.diff(edges)
    return result
