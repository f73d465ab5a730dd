"""What the processes of one run share: segments, a rank's own arrays (so that its end can be looked into), and words.

Anonymous memory, made before the ranks are forked: all see it at the same addresses, and it goes with the last of them.
"""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np

from flashmoe_numba.kernel import control as s
from flashmoe_numba.kernel import queue as q
from reference import Layout, MoEConfig
from reference.task_kinds import BACKWARD_NAMES, KIND_NAMES

Array = np.ndarray[Any, Any]

# words of a rank
PHASE, CALLS, OUTCOME, ENDED_NS, COUNTERS, TASKS, TASKS_BEFORE, DELAY_NS, LAST_STEP, FAULT_NS, LATE_NS = range(11)
SETTING_UP, BETWEEN_CALLS, IN_A_CALL, DONE = range(4)  # values of PHASE
NONE, RIGHT, GIVEN_UP, WRONG, FAILED, RAISED = range(6)  # values of OUTCOME
NUM_WORDS, TEXT_BYTES, ARENA_BYTES, ALIGNMENT = 16, 4000, 1 << 24, 128

BETWEEN, ENTERING, WAITING = "between", "entering", "waiting"
RETURNING, GIVING_UP, AFTER = "returning", "giving_up", "after"
TASKS_BY_KIND = dict(enumerate(KIND_NAMES)) | BACKWARD_NAMES
PLACES = (BETWEEN, ENTERING, *TASKS_BY_KIND.values(), WAITING, RETURNING, GIVING_UP, AFTER)


def shared_bytes(size: int) -> Array:
    """Zeroed bytes that forked processes share."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


class Memory:
    """`words[rank]` and `texts[rank]` are written by the rank (the faults' words by the parent); `go` by the parent."""

    def __init__(self, config: MoEConfig, save: str | None = None) -> None:
        self.layout, n = Layout(config, save), config.num_ranks
        self.segments = [shared_bytes(self.layout.num_bytes) for _ in range(n)]
        self.words: Array = shared_bytes(8 * NUM_WORDS * n).view(np.int64).reshape(n, NUM_WORDS)
        self.texts = shared_bytes(TEXT_BYTES * n).reshape(n, TEXT_BYTES)
        self.go: Array = shared_bytes(8).view(np.int64)
        self._arenas = [shared_bytes(ARENA_BYTES) for _ in range(n)]
        self._used = 0  # of its arena, by the rank that this process is

    def zeros(self, rank_idx: int, size: int, dtype: Any) -> Array:
        """An array of a rank, which the parent can see."""
        start, num_bytes = self._used, size * np.dtype(dtype).itemsize
        self._used += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        assert self._used <= ARENA_BYTES
        return self._arenas[rank_idx][start : start + num_bytes].view(dtype)

    def control(self, rank_idx: int) -> Array:
        """The rank's control words (kernel/control.py)."""
        return self.segments[rank_idx][self.layout.control :].view(np.int64)

    def text(self, rank_idx: int) -> str:
        return bytes(self.texts[rank_idx]).rstrip(b"\0").decode(errors="replace")

    def say(self, rank_idx: int, text: str) -> None:
        data = text.encode()[:TEXT_BYTES]
        self.texts[rank_idx, : len(data)] = np.frombuffer(data, np.uint8)

    def place(self, rank_idx: int) -> str:
        """Where a rank stands that does not run at the moment: a kind of task, or what it does instead."""
        words, control = self.words[rank_idx], self.control(rank_idx)
        if words[PHASE] == DONE:
            return AFTER
        if control[s.RECORD] != 0 or control[s.ABORT] != 0:
            return GIVING_UP
        return self._place_in_call(words, control) if words[PHASE] == IN_A_CALL else BETWEEN

    def _place_in_call(self, words: Array, control: Array) -> str:
        first = (int(words[CALLS]) & 1) * q.NUM_COUNTERS
        counters = _words_at(int(words[COUNTERS]), 2 * q.NUM_COUNTERS * q.COUNTER_STRIDE)[:: q.COUNTER_STRIDE]
        head, total = int(counters[first + q.HEAD]), int(counters[first + q.TOTAL])
        finished = int(control[s.PROGRESS] - words[TASKS_BEFORE])
        if head == 0:
            return ENTERING
        if 0 < total <= finished + 1:
            return RETURNING
        tasks = _words_at(int(words[TASKS]), head * q.TASK_WORDS).reshape(head, q.TASK_WORDS)
        begun = tasks[tasks[:, q.STAMP] == words[CALLS]]
        if len(begun) <= finished:
            return WAITING
        return TASKS_BY_KIND[q.task_of(*begun[-1, [q.WHO, q.WHERE]].tolist()).kind]


def _words_at(address: int, size: int) -> Array:
    return np.ctypeslib.as_array((ctypes.c_int64 * size).from_address(address))
