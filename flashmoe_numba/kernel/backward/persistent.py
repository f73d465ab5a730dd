"""The entry of a backward: blocks take the same roles as in a forward."""

from __future__ import annotations

from flashmoe_numba.device import jit, lane, now

from ..processor import next_task
from ..queue import read_task
from ..state import RankState
from ..subscriber import os_block
from ..trace import note_event
from ..waits import note_progress
from .tasks import run_backward_task


@jit(entry=True)
def persistent_backward(
    block, p, segments, experts, tokens, received, queue, back, gradients, scratch, box, trace
):  # fmt: skip
    """Run block `block` of this rank in a backward; the arguments that `persistent` has are the same here."""
    rank = RankState(p, segments, experts, tokens, received, queue)
    if block == p.num_processors:
        os_block(block, rank, trace)
    else:
        backward_processor(block, rank, back, gradients, scratch, box, trace)


@jit(large=True)
def backward_processor(block, rank, back, gradients, scratch, box, trace):
    while True:
        place = next_task(rank.problem, block, rank.segments, rank.queue, box)
        if place < 0:
            break
        start = now()
        task = read_task(rank.queue, place)
        run_backward_task(rank, back, gradients, scratch, box, task)
        if lane() == 0:
            note_event(trace, task, start)
            note_progress(rank.problem, rank.segments)
