"""How a wait goes on, and how it ends badly.

The deadline is for silence: a wait goes on as long as some rank finishes tasks. When no rank has for a deadline (seen
to a sixteenth of it), the waiting block writes what it waits for into its rank's control words and sets the abort word
of every rank of its host; all waits look at their own rank's abort word. That of a host's first rank decides whom its
ranks name: the first to set it has its record complete by then. Ranks of other hosts are told by a signal that comes
after the record, and may name another.
"""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_numba.device import fetch_add, jit, ld_relaxed, now, pause, st_release

from .control import ABORT, FAILED, PROGRESS, SILENT, departure, write_record
from .peers import progress_of, show_control, silence_of, tell_abort, tell_other_hosts
from .wire import is_remote

LOOKS_PER_DEADLINE = 16

departure_record = jit(departure)


@jit
def aborted(segments):
    return ld_relaxed(segments.control, ABORT) != 0


@jit
def note_progress(p, segments):
    fetch_add(segments.control, PROGRESS, 1)
    show_control(p, segments)


@jit
def total_progress(p, segments):
    """Tasks that all ranks have finished."""
    tasks = 0
    for rank_idx in range(p.num_ranks):
        tasks += progress_of(p, segments, rank_idx)
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
    show_control(p, segments)
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
    return silence_of(p, segments, rank_idx) >= max(1, p.epoch - 1)


@jit
def give_up(p, segments, record):
    """Leave a record of the wait that failed, and stop every rank. One lane calls it."""
    is_first = write_record(segments.control, record)
    abort(p, segments)
    if is_first:
        tell_other_hosts(p, segments)


@jit
def abort(p, segments):
    """Set the abort word of every rank of this host to the rank that was the first to set that of its first rank.

    Unless that is a rank of another host, whose record need not have come to all of this one.
    """
    culprit, decided = p.rank_idx + 1, False
    for rank_idx in range(p.num_ranks):
        if not is_remote(segments, rank_idx):
            before = tell_abort(p, segments, rank_idx, culprit)
            if not decided and before != 0 and not is_remote(segments, before - 1):
                culprit = before
            decided = True


@jit(entry=True)
def leave(p, segments, why=FAILED):
    """The host of this rank will not go on: say so, that the others stop now and not at the deadline."""
    give_up(p, segments, departure_record(p.rank_idx, p.epoch, why, p.deadline_ns))
