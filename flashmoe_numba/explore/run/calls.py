"""What a rank has at the end of a call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from reference import Routing, Task
from reference.runs import RowTile
from reference.task_kinds import RECEIVE

from ...heap.rank import Rank
from ...kernel.trace import EVENT_WORDS


@dataclass
class Call:
    """What one rank had at the end of one call. Of a backward, y is the gradient of the tokens."""

    y: np.ndarray
    routing: Routing
    results: np.ndarray  # elements [num_ranks, num_experts_per_rank, slots, hidden]: the rank's result region
    shared: np.ndarray  # elements [num_tokens, hidden]: of the shared expert, no rows where there is none
    factors: np.ndarray  # accumulator [num_tokens]: of these
    flags: np.ndarray  # int64 [num_experts, row_blocks]: its result flags
    rows: np.ndarray  # [num_ranks, num_experts_per_rank]: of the packets that the rank received
    tasks: Counter[Task]
    tiles: list[list[RowTile]]  # of each of its experts
    gradients: dict[str, np.ndarray]  # of a backward, by name: of weights, of topk_weights and of logits


def call_of(rank: Rank, y: np.ndarray, epoch: int, gradients: Mapping[str, np.ndarray]) -> Call:
    """Copies of what there is now, at the end of this call."""
    c = rank.config
    shape = (c.num_ranks, c.num_experts_per_rank, c.slots, c.hidden)
    shared = rank.tokens.shared_results.view(c.numpy_dtype).reshape(-1, c.hidden)[: len(y)]
    return Call(
        y=y.copy(),
        routing=rank.routing(len(y)),
        results=rank.segments.result.view(c.numpy_dtype).reshape(shape).copy(),
        shared=shared.copy(),
        factors=rank.last_tokens.shared_factors[: len(y)].copy(),
        flags=rank.segments.result_flag.reshape(c.num_experts, -1).copy(),
        rows=rank.received.rows.reshape(shape[:2]).copy(),
        tasks=_tasks(rank),
        tiles=rank.row_tiles(epoch),
        gradients={name: array.copy() for name, array in gradients.items()},
    )


def _tasks(rank: Rank) -> Counter[Task]:
    tasks: Counter[Task] = Counter()
    for trace in np.split(rank.traces, rank.num_processors + 1):
        for kind, peer, expert, m, n, *_ in trace.reshape(-1, EVENT_WORDS)[1 : trace[0] + 1].tolist():
            if kind != RECEIVE:
                tasks[Task(kind, rank.rank_idx, peer, expert, m, n)] += 1
    return tasks
