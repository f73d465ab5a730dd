"""Kinds of tile tasks as a table: which kinds they wait for, and so which they let begin.

`tiles.py` says what tasks of a kind do, and makes those of a layer; `flashmoe_numba/kernel/tasks.py` runs them.
"""

from __future__ import annotations

from typing import NamedTuple

GATE, DISPATCH, GEMM0, GEMM1, COMBINE, SHARED0, SHARED1 = range(7)


class TaskKind(NamedTuple):
    """A row of KINDS."""

    name: str
    indices: tuple[str, ...]  # fields of a Task that tell it from others of its rank; the rest are 0
    needs: tuple[int, ...]  # kinds of the tasks that it may have to wait for


KINDS = (
    TaskKind("GATE", ("m",), ()),
    TaskKind("DISPATCH", ("peer", "expert"), (GATE,)),
    TaskKind("GEMM0", ("peer", "expert", "m", "n"), (DISPATCH,)),
    TaskKind("GEMM1", ("peer", "expert", "m", "n"), (GEMM0,)),
    TaskKind("COMBINE", ("m",), (GEMM1, GATE, SHARED1)),  # of gates, where its tokens have no rows
    TaskKind("SHARED0", ("m", "n"), ()),
    TaskKind("SHARED1", ("m", "n"), (SHARED0,)),
)
KIND_NAMES = tuple(kind.name for kind in KINDS)
RECEIVE = len(KINDS)  # no tile task: the OS block saw a packet, as traces record it

# A backward has these kinds, too: what they give are the gradients of what they give in a forward. And it has kinds of
# its own, for the gradients of weights: of an expert's, the router's, the shared expert's, and the norm's of results.
WEIGHTS, ROUTER_WEIGHTS, SHARED_WEIGHTS, NORM_WEIGHTS = range(RECEIVE + 1, RECEIVE + 5)
BACKWARD_NAMES = {
    WEIGHTS: "WEIGHTS",
    ROUTER_WEIGHTS: "ROUTER_WEIGHTS",
    SHARED_WEIGHTS: "SHARED_WEIGHTS",
    NORM_WEIGHTS: "NORM_WEIGHTS",
}


def frees(kind: int) -> tuple[int, ...]:
    """Kinds of the tasks that may begin once tasks of this kind have ended."""
    return tuple(other for other, row in enumerate(KINDS) if kind in row.needs)
