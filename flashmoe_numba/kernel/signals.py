"""Signal words, and how a wait ends badly.

A signal is one 8-byte word on its reader: `(epoch << 32) | number of rows`. Nothing is cleared between calls: a word of
the current epoch means "arrived in this call".

The deadline is for silence: a wait goes on as long as some rank finishes tasks. When no rank has for a deadline (seen
to a sixteenth of it), the waiting block writes what it waits for into its rank's control words and sets the abort word
of every rank; all waits look at their own rank's abort word. Rank 0's abort word
decides whom all ranks name: the first to set it has its record complete by then.
"""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_numba.device import array_at, cas, fetch_add, jit, ld_acquire, ld_relaxed, now, pause, st_release

EPOCH_SHIFT = 32
ROWS_MASK = (1 << EPOCH_SHIFT) - 1

# control words of a segment (reference/layout.py)
ABORT = 0  # 0, or 1 + the rank that gave up
RECORD = 8  # 0 while there is none
WRITING, COMPLETE = 1, 2
RECORD_BLOCK, RECORD_ROLE, RECORD_FLAG, RECORD_PEER, RECORD_EXPERT, RECORD_M, RECORD_EPOCH, RECORD_FOUND = range(9, 17)
RECORD_MISSING, RECORD_DEADLINE_NS = 17, 18
PROGRESS = 24  # tasks that this rank has finished, ever
SILENT = 25  # the last epoch in which this rank's OS block waited for half a deadline

LOOKS_PER_DEADLINE = 16

SUBSCRIBER, PROCESSOR, HOST = 0, 1, 2
DISPATCH_FLAG, RESULT_FLAG, GATE_FLAG, TASK_FLAG, CLOSED_FLAG = 0, 1, 2, 3, 4
FAILED, CLOSED_BY_THREAD, CLOSED_EARLY = 0, 1, 2  # why a host left; in RECORD_M beside CLOSED_FLAG


@jit
def signal_word(epoch, num_rows):
    return (epoch << EPOCH_SHIFT) | int(num_rows)


@jit
def word_epoch(word):
    return word >> EPOCH_SHIFT


@jit
def word_rows(word):
    return word & ROWS_MASK


@jit
def aborted(segments):
    return ld_relaxed(segments.control, ABORT) != 0


@jit
def note_progress(segments):
    fetch_add(segments.control, PROGRESS, 1)


@jit
def total_progress(p, segments):
    """Tasks that all ranks have finished."""
    tasks = 0
    for rank_idx in range(p.num_ranks):
        control = array_at(segments.address[rank_idx] + p.control_at, segments.control.size, segments.control)
        tasks += ld_relaxed(control, PROGRESS)
    return tasks


class Wait(NamedTuple):
    """How a wait is going; times in nanoseconds."""

    attempt: int  # polls so far
    since: int  # when some rank was last seen to make progress
    looked: int  # when progress was last looked at
    progress: int  # tasks that all ranks had finished then; -1 before the first look


@jit
def begin_wait():
    start = now()
    return Wait(0, start, start, -1)


@jit
def keep_waiting(p, segments, wait):
    """Give way, and now and then look whether any rank has finished a task."""
    attempt = pause(wait.attempt)
    time = now()
    if time - wait.looked < p.deadline_ns // LOOKS_PER_DEADLINE:
        return Wait(attempt, wait.since, wait.looked, wait.progress)
    progress = total_progress(p, segments)
    slept = time - wait.looked > p.deadline_ns // 4  # the process was stopped: it cannot tell of the others
    moved = slept or (wait.progress >= 0 and progress != wait.progress)
    return Wait(attempt, time if moved else wait.since, time, progress)


@jit
def silence_ns(wait):
    """How long no rank has been seen to make progress."""
    return wait.looked - wait.since


@jit
def note_silence(p, segments, wait):
    """After half a deadline, tell the others that this rank waits itself, and is not the one to blame."""
    if silence_ns(wait) > p.deadline_ns // 2:
        st_release(segments.control, SILENT, p.epoch)


@jit
def waits_itself(p, segments, rank_idx):
    """Does this rank wait for others in this epoch, or in the last one if it is not beyond that?"""
    control = array_at(segments.address[rank_idx] + p.control_at, segments.control.size, segments.control)
    return ld_relaxed(control, SILENT) >= max(1, p.epoch - 1)


@jit
def give_up(p, segments, block, role, flag, peer, expert, m, found, missing):
    """Record the wait that failed and stop every rank. One lane calls it."""
    control = segments.control
    if cas(control, RECORD, 0, WRITING) == 0:
        control[RECORD_BLOCK] = block
        control[RECORD_ROLE] = role
        control[RECORD_FLAG] = flag
        control[RECORD_PEER] = peer
        control[RECORD_EXPERT] = expert
        control[RECORD_M] = m
        control[RECORD_EPOCH] = p.epoch
        control[RECORD_FOUND] = found
        control[RECORD_MISSING] = missing
        control[RECORD_DEADLINE_NS] = p.deadline_ns
        st_release(control, RECORD, COMPLETE)
    attempt = 0
    while ld_acquire(control, RECORD) != COMPLETE:  # another block of this rank is at it
        attempt = pause(attempt)
    abort(p, segments)


@jit
def abort(p, segments):
    """Set every rank's abort word to the rank that was the first to set rank 0's."""
    culprit = p.rank_idx + 1
    for rank_idx in range(p.num_ranks):
        control = array_at(segments.address[rank_idx] + p.control_at, segments.control.size, segments.control)
        before = cas(control, ABORT, 0, culprit)
        if rank_idx == 0 and before != 0:
            culprit = before


@jit(entry=True)
def leave(p, segments, why=FAILED):
    """The host of this rank will not go on: say so, that the others stop now and not at the deadline."""
    give_up(p, segments, 0, HOST, CLOSED_FLAG, p.rank_idx, 0, why, 0, 0)
