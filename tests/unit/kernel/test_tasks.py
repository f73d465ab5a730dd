"""The kernel runs every kind of task that the table has, each in one branch, and only those."""

import ast

from flashmoe_numba.device.compilation import PACKAGE
from reference.task_kinds import KIND_NAMES


def branches(source):
    """Kinds that `run_task` compares with, in order."""
    module = ast.parse(source)
    (function,) = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == "run_task"]
    return [node.test.comparators[0].id for node in ast.walk(function) if isinstance(node, ast.If)]


def test_there_is_a_branch_for_every_kind():
    source = (PACKAGE / "kernel" / "tasks.py").read_text(encoding="utf-8")
    assert branches(source) == list(KIND_NAMES)
    assert branches(source.replace("task.kind == GEMM1", "task.kind == GEMM0")) != list(KIND_NAMES)
