"""The ticket queue of a rank: any block appends tasks, a processor draws a ticket and waits for that place to fill.

A place holds its epoch as a stamp, stored with release after the task's fields, so places are never cleared. Counters
come in two sets, used in turn by epochs: while one is in use the OS block zeroes the other for the next epoch.
"""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_numba.device import fetch_add, jit, ld_relaxed, st_release

TASK_WORDS = 8  # one cache line, of which three words are used
STAMP, WHO, WHERE = range(3)  # the stamp; kind, peer and expert; m and n
KIND_BITS, PEER_BITS, M_BITS = 8, 24, 32  # of these words, from the lowest bit on; expert and n have the rest

COUNTER_STRIDE = 16  # counters that different blocks hammer lie two cache lines apart
HEAD, TAIL, GATES_DONE, GATE_OPEN, PACKETS_SEEN, GEMM_TASKS, HIDDEN_ROWS, KEPT_ROWS, TOTAL = range(9)
NUM_COUNTERS = 9


class QueueTask(NamedTuple):
    """A task as it lies in the queue: `reference.Task`, but for the rank."""

    kind: int
    peer: int
    expert: int
    m: int
    n: int


def task_words(task: QueueTask) -> tuple[int, int]:
    """(WHO, WHERE) of a task, whose numbers are not negative."""
    return task.kind | task.peer << KIND_BITS | task.expert << KIND_BITS + PEER_BITS, task.m | task.n << M_BITS


def task_of(who: int, where: int) -> QueueTask:
    """The task of these words."""
    kind, peer = who & (1 << KIND_BITS) - 1, who >> KIND_BITS & (1 << PEER_BITS) - 1
    return QueueTask(kind, peer, who >> KIND_BITS + PEER_BITS, where & (1 << M_BITS) - 1, where >> M_BITS)


pack, unpack = jit(task_words), jit(task_of)


@jit
def counter(p, name):
    """Index of one of this epoch's counters."""
    return ((p.epoch & 1) * NUM_COUNTERS + name) * COUNTER_STRIDE


@jit
def zero_next_counters(p, queue):
    """Make the other set ready for the next epoch."""
    other = (1 - (p.epoch & 1)) * NUM_COUNTERS * COUNTER_STRIDE
    for i in range(NUM_COUNTERS * COUNTER_STRIDE):
        queue.counters[other + i] = 0


@jit
def reserve(p, queue, num_tasks):
    """Take the next `num_tasks` places; returns the first."""
    return fetch_add(queue.counters, counter(p, TAIL), num_tasks)


@jit
def is_idle(p, queue):
    """Has some processor drawn a ticket for which there is no task yet?"""
    return ld_relaxed(queue.counters, counter(p, HEAD)) > ld_relaxed(queue.counters, counter(p, TAIL))


@jit
def fill(p, queue, place, task):
    """Publish a task in a reserved place."""
    at = place * TASK_WORDS
    who, where = pack(task)
    queue.tasks[at + WHO] = who
    queue.tasks[at + WHERE] = where
    st_release(queue.tasks, at + STAMP, p.epoch)


@jit
def push(p, queue, task):
    fill(p, queue, reserve(p, queue, 1), task)


@jit
def read_task(queue, place):
    """The task in a place that has been filled."""
    at = place * TASK_WORDS
    return unpack(queue.tasks[at + WHO], queue.tasks[at + WHERE])
