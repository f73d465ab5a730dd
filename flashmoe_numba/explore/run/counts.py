"""Are a call's row tiles such as may be, and its tasks those of these tiles?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from reference import GATE, KIND_NAMES, MoEConfig, Packets, Task, task_graph
from reference.backward_tiles import backward_task_graph
from reference.runs import RowTile, row_tiles, tiling_problem
from reference.task_kinds import BACKWARD_NAMES

from ...tile_gemm import GRADIENT_COLUMNS, GRADIENT_ROWS
from .calls import Call
from .reports import Report

MOST_TASKS = 4  # named in a report


class Counts:
    """Remembers the tasks that tiles have: runs have the same ones again and again.

    Args:
        frozen: kinds of tasks that backwards have not.
    """

    def __init__(self, config: MoEConfig, frozen: Collection[int]) -> None:
        self._config, self._frozen = config, frozen
        self._tasks: dict[tuple[Any, ...], list[Counter[Task]]] = {}  # by call and tiles: of all ranks

    def wrong(
        self, epoch: int, calls: Sequence[Call], packets: Sequence[Packets], packing: str, routed: bool | None
    ) -> Iterator[Report]:
        """Row tiles that may not be, or tasks that are not those of these tiles.

        Args:
            calls, packets: of each rank: what its call left, and what it sent.
            routed: of a backward: was the routing given? None: it is a forward.
        """
        tiles = [of_expert for call in calls for of_expert in call.tiles]
        key = epoch, *map(tuple, tiles)
        if key not in self._tasks:
            wrong = list(_wrong_tiles(epoch, tiles, packets, self._config, packing))
            if wrong:
                yield from wrong
                return
            if routed is None:
                graph = task_graph(packets, self._config, tiles)
            else:
                step = GRADIENT_ROWS, GRADIENT_COLUMNS
                graph = backward_task_graph(packets, self._config, tiles, routed=routed, gradient_tile=step)
                graph = {task: needs for task, needs in graph.items() if task.kind not in self._frozen}
            self._tasks[key] = [_tasks_of(rank, graph) for rank in range(self._config.num_ranks)]
        for rank, (call, tasks) in enumerate(zip(calls, self._tasks[key], strict=True)):
            yield from _miscounts(f"rank {rank}, call {epoch}:", call, tasks)


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
    is_known = 0 <= task.kind < len(KIND_NAMES) or task.kind in BACKWARD_NAMES
    return str(task) if is_known else f"kind {task.kind}{tuple(task[1:])}"


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
