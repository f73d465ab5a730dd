"""The ticket queue of a rank: any block appends tasks, a processor draws a ticket and waits for that place to fill.

A place holds its epoch as a stamp, stored with release after the task's fields, so places are never cleared. Counters
come in two sets, used in turn by epochs: while one is in use the OS block zeroes the other for the next epoch.
"""

from __future__ import annotations

from typing import NamedTuple

from flashmoe_numba.device import fetch_add, jit, st_release

TASK_WORDS = 8  # one cache line: stamp, kind, peer, expert, m, n
STAMP, KIND, PEER, EXPERT, M, N = range(6)

COUNTER_STRIDE = 16  # counters that different blocks hammer lie two cache lines apart
HEAD, TAIL, GATES_DONE, GATE_OPEN, PACKETS_SEEN, GEMM_TASKS, HIDDEN_ROWS, TOTAL = range(8)
NUM_COUNTERS = 8


class QueueTask(NamedTuple):
    """A task as it lies in the queue: `reference.Task`, but for the rank."""

    kind: int
    peer: int
    expert: int
    m: int
    n: int


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
def fill(p, queue, place, task):
    """Publish a task in a reserved place."""
    at = place * TASK_WORDS
    queue.tasks[at + KIND] = task.kind
    queue.tasks[at + PEER] = task.peer
    queue.tasks[at + EXPERT] = task.expert
    queue.tasks[at + M] = task.m
    queue.tasks[at + N] = task.n
    st_release(queue.tasks, at + STAMP, p.epoch)


@jit
def push(p, queue, task):
    fill(p, queue, reserve(p, queue, 1), task)


@jit
def read_task(queue, place):
    """The task in a place that has been filled."""
    at = place * TASK_WORDS
    kind, peer, expert = queue.tasks[at + KIND], queue.tasks[at + PEER], queue.tasks[at + EXPERT]
    return QueueTask(kind, peer, expert, queue.tasks[at + M], queue.tasks[at + N])
