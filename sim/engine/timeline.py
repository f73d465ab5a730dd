"""What a run of a graph says: when each node was ready, started and complete, and which tasks ran together.

Times are integer nanoseconds from the start. A run is tasks of one node that started at one moment on one server, so
they also end at one: `run_count` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .graph import Array, TaskGraph

MAX_LISTED = 10


class DeadlockError(RuntimeError):
    """Nodes that never ran: each waits for one that waits in its turn, or for itself."""


@dataclass(frozen=True, eq=False)
class Timeline:
    """Args:
    ready_ns, start_ns, done_ns: `[num_nodes]`; start of the first task, completion of the last (bytes arrived).
    cause: `[num_nodes]`, the predecessor that was complete last, -1 without one.
    run_node, run_count, run_start_ns, run_end_ns: `[num_runs]` in the order in which runs started. The end is that
        of the server's slots.
    run_arrive_ns: `[num_runs]`, when the bytes or the signal of a run were there: its end, if it sends nothing.
    link_bytes, link_busy_ns: `[num_links]`, carried, and time with at least one transfer.
    link_peak: `[num_links]`, most transfers at a time.
    queue_peak: `[num_servers]`, most nodes that waited at a time for a slot.
    num_events: events processed.
    """

    ready_ns: Array
    start_ns: Array
    done_ns: Array
    cause: Array
    run_node: Array
    run_count: Array
    run_start_ns: Array
    run_end_ns: Array
    run_arrive_ns: Array
    link_bytes: Array
    link_busy_ns: Array
    link_peak: Array
    queue_peak: Array
    num_events: int

    @property
    def makespan_ns(self) -> int:
        return int(self.done_ns.max(initial=0))


def check_complete(graph: TaskGraph, left: Sequence[int] | Array) -> None:
    """Raise `DeadlockError` if some nodes have predecessors left; `left` is `[num_nodes]`.

    Raises:
        DeadlockError: lists who waits for what.
    """
    waiting = np.flatnonzero(np.asarray(left) > 0)
    if not waiting.size:
        return
    stuck = set(waiting.tolist())
    lines = [f"deadlock: {waiting.size} of {graph.num_nodes} nodes can never run"]
    for node in waiting[:MAX_LISTED].tolist():
        blockers = [graph.describe(pred) for pred in graph.predecessors(node).tolist() if pred in stuck]
        lines.append(f"  {graph.describe(node)} waits for {'; '.join(blockers[:3])}")
    if waiting.size > MAX_LISTED:
        lines.append(f"  and {waiting.size - MAX_LISTED} more")
    raise DeadlockError("\n".join(lines))
