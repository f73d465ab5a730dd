"""The table of task kinds says of every task of a layer what it waits for, and what tells it from others."""

import numpy as np
import pytest
from cases import random_routing, tiny_config

from reference import make_packets, task_graph
from reference.task_kinds import COMBINE, DISPATCH, GATE, GEMM0, GEMM1, KIND_NAMES, KINDS, SHARED0, SHARED1, frees


@pytest.fixture
def graph():
    """Of ranks with tokens and without, with rows that are dropped, and a token block that has none."""
    config = tiny_config(capacity=1, num_ranks=2, shared_ffn=5)
    topk_idx, _ = random_routing(config, [7, 0], 3, 2.0)
    topk_idx = [np.where(np.arange(len(idx))[:, None] < 3, -1, idx) for idx in topk_idx]
    return task_graph([make_packets(idx, config) for idx in topk_idx], config)


def test_tasks_wait_for_the_kinds_that_the_table_says(graph):
    needs = {kind: set() for kind in range(len(KINDS))}
    for task, before in graph.items():
        needs[task.kind] |= {other.kind for other in before}
    assert needs == {kind: set(row.needs) for kind, row in enumerate(KINDS)}


def test_tasks_have_the_indices_that_the_table_says(graph):
    for task in graph:
        row = KINDS[task.kind]
        others = set(task._fields) - {"kind", "rank", *row.indices}
        assert all(getattr(task, name) == 0 for name in others), f"{task}"


def test_what_a_kind_frees_is_what_needs_it():
    assert KIND_NAMES == ("GATE", "DISPATCH", "GEMM0", "GEMM1", "COMBINE", "SHARED0", "SHARED1")
    assert [frees(kind) for kind in (GATE, DISPATCH, GEMM0, GEMM1, COMBINE, SHARED0, SHARED1)] == [
        (DISPATCH, COMBINE), (GEMM0,), (GEMM1,), (COMBINE,), (), (SHARED1,), (COMBINE,),
    ]  # fmt: skip
