"""A launch of a backward for many ranks: as that of a forward (../grid.py), with more in each rank's arguments."""

from __future__ import annotations

from flashmoe_numba.device import jit, record_at

from ..grid import begin_trace, find_record, leave_epoch
from .persistent import persistent_backward


@jit
def grid_block_backward(index, table, like, scratch, box):
    """Run block `index` of the launch; `like` is any value of the type `BackwardArguments`."""
    at, block = find_record(index, table)
    r = record_at(table, at, like)
    f = r.forward
    trace = begin_trace(f.traces, table, block)
    persistent_backward(
        block, f.problem, f.segments, f.experts, f.tokens, f.received, f.queue, r.back, r.gradients, scratch, box, trace
    )
    leave_epoch(table, at, f.left)
