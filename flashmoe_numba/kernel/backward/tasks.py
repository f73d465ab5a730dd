"""Running a task of a backward: one branch for each kind (reference/task_kinds.py).

The kinds of a forward are here what gives their gradients: GATE opens the gate with the routing that there is, DISPATCH
sends rows of dy, GEMM0 multiplies by the down matrices and GEMM1 by the up matrices, COMBINE adds up rows of dx.
"""

from __future__ import annotations

from flashmoe_numba.device import jit
from reference.task_kinds import (
    COMBINE,
    DISPATCH,
    GATE,
    GEMM0,
    GEMM1,
    NORM_WEIGHTS,
    ROUTER_WEIGHTS,
    SHARED0,
    SHARED1,
    SHARED_WEIGHTS,
    WEIGHTS,
)

from .combine import combine
from .dispatch import dispatch, reopen_gate
from .gemms import gemm0, gemm1
from .norm import norm_weights
from .shared import shared0, shared1
from .weights import router_weights, shared_weights, weights


@jit(large=True)
def run_backward_task(rank, back, gradients, scratch, box, task):
    """All lanes of a block do what the task's kind says, and tell who waits for it."""
    p, segments, experts = rank.problem, rank.segments, rank.experts
    tokens, received, queue = rank.tokens, rank.received, rank.queue
    if task.kind == GATE:
        reopen_gate(p, tokens, queue)
    elif task.kind == DISPATCH:
        dispatch(p, tokens, segments, experts, back, queue, task.peer, task.expert)
    elif task.kind == GEMM0:
        gemm0(p, segments, experts, received, back, queue, scratch, box, task)
    elif task.kind == GEMM1:
        gemm1(p, segments, experts, received, back, scratch, task)
    elif task.kind == COMBINE:
        combine(p, tokens, segments, experts, back, gradients, queue, scratch, task.m)
    elif task.kind == SHARED0:
        shared0(p, tokens, experts, back, queue, scratch, box, task)
    elif task.kind == SHARED1:
        shared1(p, tokens, experts, back, queue, scratch, task)
    elif task.kind == WEIGHTS:
        weights(p, received, back, gradients, scratch, task)
    elif task.kind == ROUTER_WEIGHTS:
        router_weights(p, tokens, experts, back, gradients, scratch, task)
    elif task.kind == SHARED_WEIGHTS:
        shared_weights(p, tokens, back, gradients, scratch, task)
    elif task.kind == NORM_WEIGHTS:
        norm_weights(p, tokens, experts, back, gradients, task)
