"""A processor block: draw a ticket, wait for its task, run it, tell who depends on it; until the rank has no more."""

from __future__ import annotations

from flashmoe_numba.device import block_sync, fetch_add, jit, lane, ld_acquire, now

from .control import PROCESSOR, TASK_FLAG, AbortRecord
from .queue import HEAD, STAMP, TASK_WORDS, TOTAL, counter, read_task
from .state import PLACE
from .tasks import run_task
from .trace import note_event
from .waits import aborted, begin_wait, give_up, keep_waiting, note_progress, silence_ns


@jit(large=True)
def processor(block, rank, scratch, box, trace):
    while True:
        place = next_task(rank.problem, block, rank.segments, rank.queue, box)
        if place < 0:
            break
        start = now()
        task = read_task(rank.queue, place)
        run_task(rank, scratch, box, task)
        if lane() == 0:
            note_event(trace, task, start)
            note_progress(rank.problem, rank.segments)


@jit
def next_task(p, block, segments, queue, box):
    """Place of the next task, the same for all lanes; -1 when there is none left or the call was aborted."""
    block_sync()
    if lane() == 0:
        box[PLACE] = wait_for_place(p, block, segments, queue)
    block_sync()
    return box[PLACE]


@jit
def wait_for_place(p, block, segments, queue):
    place = fetch_add(queue.counters, counter(p, HEAD), 1)
    stamp_at = place * TASK_WORDS + STAMP
    num_places = queue.tasks.size // TASK_WORDS
    wait = begin_wait()
    while place >= num_places or ld_acquire(queue.tasks, stamp_at) != p.epoch:
        total = ld_acquire(queue.counters, counter(p, TOTAL))  # 0 while unknown, else 1 + the number of tasks
        if total > 0 and place >= total - 1:
            return -1
        if aborted(segments):
            return -1
        wait = keep_waiting(p, segments, wait)
        if silence_ns(wait) > p.deadline_ns + p.deadline_ns // 2:  # the OS block knows more, so it should speak first
            record = AbortRecord(block, PROCESSOR, TASK_FLAG, p.rank_idx, 0, place, p.epoch, total, 1, p.deadline_ns)
            give_up(p, segments, record)
            return -1
    return -1 if aborted(segments) else place  # nobody wants the rest of the queue any more
