"""Are a call's row tiles such as may be, and its tasks those of these tiles?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from reference import GATE, KIND_NAMES, MoEConfig, Packets, Task, task_graph
from reference.runs import RowTile, row_tiles, tiling_problem
from reference.task_kinds import BACKWARD_NAMES, ROUTER_WEIGHTS, SHARED_WEIGHTS, WEIGHTS

from ...kernel.weights import DOWN, UP
from ...kernel.weights import GATE as OF_GATE
from ...tile_gemm import GRADIENT_COLUMNS, GRADIENT_ROWS
from .calls import Call
from .reports import Report

MOST_TASKS = 4  # named in a report
STEPS = GRADIENT_ROWS, GRADIENT_COLUMNS  # of a matrix whose gradient is made: what one task makes


class Counts:
    """Remembers the tasks that tiles have: runs have the same ones again and again."""

    def __init__(self, config: MoEConfig, packing: str) -> None:
        self._config, self._packing = config, packing
        self._tasks: dict[tuple[Any, ...], list[Counter[Task]]] = {}  # by call and tiles: of all ranks

    def wrong(
        self,
        epoch: int,
        calls: Sequence[Call],
        packets: Sequence[Packets],
        routed: Sequence[bool],
        is_backward: bool,
    ) -> Iterator[Report]:
        """Row tiles that may not be, or tasks that are not those of these tiles.

        Args:
            calls, packets, routed: of each rank: what its call left, what it sent, and was its routing given?
        """
        tiles = [of_expert for call in calls for of_expert in call.tiles]
        key = epoch, *map(tuple, tiles)
        if key not in self._tasks:
            wrong = list(_wrong_tiles(epoch, tiles, packets, self._config, self._packing))
            if wrong:
                yield from wrong
                return
            graph = task_graph(packets, self._config, tiles)
            found = [_tasks_of(rank, graph) for rank in range(self._config.num_ranks)]
            self._tasks[key] = self._of_backward(found, packets, routed) if is_backward else found
        for rank, (call, tasks) in enumerate(zip(calls, self._tasks[key], strict=True)):
            yield from _miscounts(f"rank {rank}, call {epoch}:", call, tasks)

    def _of_backward(
        self, forward: Sequence[Counter[Task]], packets: Sequence[Packets], routed: Sequence[bool]
    ) -> list[Counter[Task]]:
        """With one gate for each rank in place of a forward's, and with the tasks for gradients of weights."""
        config, found = self._config, []
        sent = np.sum([packet.sent for packet in packets], axis=0).reshape(config.num_ranks, -1)
        for rank, tasks in enumerate(forward):
            same = Counter({task: times for task, times in tasks.items() if task.kind != GATE})
            has_tokens = len(packets[rank].slot) > 0
            more = _weight_tasks(rank, sent[rank].tolist(), has_tokens, routed[rank], config)
            found.append(same + Counter([Task(GATE, rank)]) + more)
        return found


def _wrong_tiles(
    epoch: int, tiles: list[list[RowTile]], packets: Sequence[Packets], config: MoEConfig, packing: str
) -> Iterator[Report]:
    """The first expert whose rows are not cut as they may be."""
    for expert, of_expert in enumerate(tiles):
        rows = [int(packet.sent[expert]) for packet in packets]
        problem = tiling_problem(of_expert, rows, config)
        if problem is None and packing == "none" and of_expert != row_tiles(rows, config):
            problem = "a packet must have tiles of its own, cut where its chunks are"
        if problem:
            yield Report("tiles", f"call {epoch}, expert {expert}: {problem}")
            return


def _name(task: Task) -> str:
    """A spoilt queue may hold tasks of no kind there is."""
    if 0 <= task.kind < len(KIND_NAMES):
        return str(task)
    return f"{BACKWARD_NAMES.get(task.kind, f'kind {task.kind}')}{tuple(task[1:])}"


def _tasks_of(rank: int, graph: Mapping[Task, list[Task]]) -> Counter[Task]:
    tasks = Counter(task for task in graph if task.rank == rank)
    tasks[Task(GATE, rank)] = 1  # a rank without tokens runs one, too, which tells every peer so
    return tasks


def _miscounts(case: str, call: Call, tasks: Counter[Task]) -> Iterator[Report]:
    """Tasks against what they should be."""
    if call.tasks != tasks:
        wrong = [task for task in sorted(call.tasks | tasks) if call.tasks[task] != tasks[task]]
        texts = [f"{_name(task)} ran {call.tasks[task]} times, wanted {tasks[task]}" for task in wrong[:MOST_TASKS]]
        texts += [f"and {len(wrong) - MOST_TASKS} more"] if len(wrong) > MOST_TASKS else []
        yield Report("count", f"{case} {'; '.join(texts)}")


def _weight_tasks(rank: int, rows: Iterable[int], has_tokens: bool, routed: bool, config: MoEConfig) -> Counter[Task]:
    """Those of one backward of a rank.

    Args:
        rows: that each of its experts received.
        routed: was the routing given? Then the router has no gradients.
    """
    c, tasks = config, Counter[Task]()

    def add(kind: int, expert: int, matrices: dict[int, tuple[int, int]]) -> None:
        for matrix, size in matrices.items():
            tiles = [range(-(-length // step)) for length, step in zip(size, STEPS, strict=True)]
            tasks.update(Task(kind, rank, matrix, expert, m, n) for m in tiles[0] for n in tiles[1])

    for expert, count in enumerate(rows):
        if count:
            add(WEIGHTS, expert, {UP: (c.expert_kind.num_ups * c.ffn, c.hidden), DOWN: (c.hidden, c.ffn)})
    if has_tokens and not routed:
        add(ROUTER_WEIGHTS, 0, {UP: (c.num_choices, c.hidden)})
    if has_tokens and c.shared_ffn:
        shared = {UP: (c.shared_kind.num_ups * c.shared_ffn, c.hidden), DOWN: (c.hidden, c.shared_ffn)}
        add(SHARED_WEIGHTS, 0, shared | ({OF_GATE: (1, c.hidden)} if c.shared_gate else {}))
    return tasks
