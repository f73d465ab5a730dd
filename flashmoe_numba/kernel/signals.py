"""Signal words, and the control words of a segment.

A signal is one 8-byte word on its reader: `(epoch << 32) | number of rows`. Nothing is cleared between calls: a word of
the current epoch means "arrived in this call".
"""

from __future__ import annotations

from flashmoe_numba.device import jit

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
