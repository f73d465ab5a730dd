"""What each block did and when: one record per task in a buffer of the block's own."""

from __future__ import annotations

from flashmoe_numba.device import fetch_add, jit, now

EVENT_WORDS = 8  # kind, peer, expert, m, n, start, end


@jit
def note_event(trace, task, start):
    """Append what this lane did. `trace[0]` counts records; an empty buffer takes none, a full one only counts."""
    if trace.size > 0:
        i = fetch_add(trace, 0, 1) + 1
        at = i * EVENT_WORDS
        if at + EVENT_WORDS <= trace.size:
            trace[at] = task.kind
            trace[at + 1] = task.peer
            trace[at + 2] = task.expert
            trace[at + 3] = task.m
            trace[at + 4] = task.n
            trace[at + 5] = start
            trace[at + 6] = now()
