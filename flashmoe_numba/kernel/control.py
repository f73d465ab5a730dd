"""The control words of a segment: whether and why its rank gave up, and how far it is.

A rank that gives up leaves one *abort record*, of what it waited for: all fields, then the word that says so. Nobody
writes another one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flashmoe_numba.device import cas, jit, ld_acquire, pause, st_release

# words (reference/layout.py)
ABORT = 0  # 0, or 1 + the rank that gave up
RECORD = 8  # 0 while there is none; its fields come behind it
PROGRESS = 24  # tasks that this rank has finished, ever
SILENT = 25  # the last epoch in which this rank's OS block waited for half a deadline

WRITING, COMPLETE = 1, 2  # values of RECORD

SUBSCRIBER, PROCESSOR, HOST = 0, 1, 2  # roles
DISPATCH_FLAG, RESULT_FLAG, GATE_FLAG, TASK_FLAG, CLOSED_FLAG, OTHER_CALL = 0, 1, 2, 3, 4, 5
FAILED, CLOSED_BY_THREAD, CLOSED_EARLY = 0, 1, 2  # why a host left


class AbortRecord(NamedTuple):
    """What the wait that failed waited for; with CLOSED_FLAG, that a host left; with OTHER_CALL, that a peer's packet
    is of another call than this rank's. Words behind RECORD, in this order.
    """

    block: int
    role: int
    flag: int
    peer: int
    expert: int
    m: int  # result chunk; place of the queue with TASK_FLAG; why with CLOSED_FLAG; the rank's own call with OTHER_CALL
    epoch: int
    found: int  # the flag's word
    missing: int  # flags that the block waited for
    deadline_ns: int


RECORD_FIELDS = slice(RECORD + 1, RECORD + 1 + len(AbortRecord._fields))


@jit
def write_record(control, record):
    """Leave this record, unless the rank has one; it is complete then. True: this one is it. One lane calls it."""
    is_first = cas(control, RECORD, 0, WRITING) == 0
    if is_first:
        for i in range(len(record)):
            control[RECORD + 1 + i] = record[i]
        st_release(control, RECORD, COMPLETE)
    attempt = 0
    while ld_acquire(control, RECORD) != COMPLETE:  # another block of this rank is at it
        attempt = pause(attempt)
    return is_first


def departure(rank_idx: int, epoch: int, why: int, deadline_ns: int) -> AbortRecord:
    """The record of a host that leaves."""
    return AbortRecord(0, HOST, CLOSED_FLAG, rank_idx, 0, why, epoch, 0, 0, deadline_ns)


def record_stores(record: AbortRecord) -> list[tuple[int, int]]:
    """(word, value) of every store that leaves a record, in order, where no kernel does it."""
    return [*enumerate(record, RECORD + 1), (RECORD, COMPLETE)]


def record_in(control: np.ndarray) -> AbortRecord | None:
    """The record in a rank's control words, once it is complete."""
    return record_fields(control) if control[RECORD] == COMPLETE else None


def record_fields(control: Any) -> AbortRecord:
    """The same, of an array or of watched memory, by whoever has acquired that it is complete."""
    return AbortRecord(*control[RECORD_FIELDS].tolist())
