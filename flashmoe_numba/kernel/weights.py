"""Gradients of weights, in a backward: sums over rows, as tiles of the same queue.

An expert's matrices: when all its packets are here and its hidden rows' gradients are made, of all rows. One chain of
multiply-adds for each element, over the rows in the order of their sources and slots, that goes on from what earlier
calls have left: which ranks the rows come from, and when, is not in the result.
"""

from __future__ import annotations

from flashmoe_numba.device import fetch_add, jit
from flashmoe_numba.tile_gemm import GRADIENT_COLUMNS, GRADIENT_ROWS
from reference.task_kinds import WEIGHTS

from .queue import QueueTask, fill, reserve

UP, DOWN, GATE = range(3)  # which matrices of an expert; the last one is the shared expert's gate


@jit
def need_weights(p, received, queue, expert, more):
    """The gradient of an expert's weights needs so many more rows, or fewer; who finds that it needs none queues it.

    Counts come in any order: it is below zero while rows are done and packets are missing.
    """
    if fetch_add(received.weights_left, expert, more) + more == 0:
        place = reserve(p, queue, p.weight_tasks)
        place = fill_weights(p, queue, place, QueueTask(WEIGHTS, UP, expert, 0, 0), p.parts * p.ffn, p.hidden)
        fill_weights(p, queue, place, QueueTask(WEIGHTS, DOWN, expert, 0, 0), p.hidden, p.ffn)


@jit
def fill_weights(p, queue, place, task, rows, columns):
    """A task for each tile of a matrix of this size, like `task`; returns the place behind them."""
    for m in range(gradient_rows(rows)):
        for n in range(gradient_columns(columns)):
            fill(p, queue, place, QueueTask(task.kind, task.peer, task.expert, m, n))
            place += 1
    return place


@jit
def gradient_rows(rows):
    return (rows + GRADIENT_ROWS - 1) // GRADIENT_ROWS


@jit
def gradient_columns(columns):
    return (columns + GRADIENT_COLUMNS - 1) // GRADIENT_COLUMNS
