"""Running a task: one branch for each row of the table of kinds (reference/task_kinds.py)."""

from __future__ import annotations

from flashmoe_numba.device import jit
from reference.task_kinds import COMBINE, DISPATCH, GATE, GEMM0, GEMM1, SHARED0, SHARED1

from .combine import combine
from .dispatch import dispatch
from .gate import gate
from .gemms import gemm0, gemm1
from .shared import shared0, shared1


@jit(large=True)
def run_task(rank, scratch, box, task):
    """All lanes of a block do what the task's kind says, and tell who waits for it."""
    p, segments, experts = rank.problem, rank.segments, rank.experts
    tokens, received, queue = rank.tokens, rank.received, rank.queue
    if task.kind == GATE:
        gate(p, tokens, experts, queue, scratch, box, task.m)
    elif task.kind == DISPATCH:
        dispatch(p, tokens, segments, task.peer, task.expert)
    elif task.kind == GEMM0:
        gemm0(p, segments, experts, received, queue, scratch, task)
    elif task.kind == GEMM1:
        gemm1(p, segments, experts, received, scratch, task)
    elif task.kind == COMBINE:
        combine(p, tokens, segments, experts.norm, scratch, task.m)
    elif task.kind == SHARED0:
        shared0(p, tokens, experts, queue, scratch, task)
    elif task.kind == SHARED1:
        shared1(p, tokens, experts, queue, scratch, task)
