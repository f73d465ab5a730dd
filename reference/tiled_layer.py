"""A NumPy execution of every tile task, on segments laid out as on a real machine, in any legal order.

Rows travel by one-sided writes to the byte offsets of `Layout`, and are read through arrays of its shapes. Sums are in
`config.accumulator`, hidden activations and results are rounded to the element type, a COMBINE adds in the order of j,
then the shared expert's part.
Memory starts as NaN, so a task that runs too early cannot go unnoticed. Leaves out: signals' epochs, concurrency, time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from .activations import sigmoid
from .arrays import Array
from .config import MoEConfig
from .experts import activate, linear, normalize
from .layer import expert_input, expert_term, source_routings, sources
from .layout import DISPATCH, RESULT, Layout, Write, write_conflicts
from .packets import make_packets
from .routers import Routing, choose
from .runs import RowTile, expert_tiles
from .tiles import Task, num_token_blocks, shared_row_tiles, task_graph, tiles_n1
from .weights import Weights

EPOCH = 1  # there is one only
ROWS_MASK = (1 << 32) - 1  # of a flag word; the epoch is above


class TiledLayer:
    """One call of the layer on all ranks, task by task.

    Args:
        x: `[num_tokens_of_rank, hidden]` of each rank, in `config.numpy_dtype`.
        weights: all experts.
        topk_idx, topk_weights: `[num_tokens_of_rank, num_topk]` of each rank, instead of the router's. Both or none.

    Attributes:
        tiles: the row tiles of each expert.
        graph: every task and the tasks it waits for.
        done: tasks run so far.
        writes: rows stored into segments, one list per column tile (a dispatched row is one write, in the first list).
        y: `[num_tokens_of_rank, hidden]` of each rank, in `config.numpy_dtype`; NaN where not yet combined.
    """

    def __init__(
        self,
        x: Sequence[Array],
        weights: Weights,
        config: MoEConfig,
        topk_idx: Sequence[Array] | None = None,
        topk_weights: Sequence[Array] | None = None,
    ) -> None:
        weights.check_all(config)
        self.config, self.weights, self.layout = config, weights, Layout(config)
        self.x = sources(list(x), config)
        for rank, part in enumerate(self.x):
            if part.dtype != config.numpy_dtype:
                raise TypeError(f"x[{rank}] must have config's dtype {config.dtype}, got {part.dtype}")
        external = topk_idx is not None or topk_weights is not None
        self._external = source_routings(self.x, weights, config, topk_idx, topk_weights) if external else None
        self.packets = [make_packets(self._planned_topk_idx(rank), config) for rank in range(config.num_ranks)]
        self.tiles = expert_tiles(self.packets, config)
        self.graph = task_graph(self.packets, config, self.tiles)
        self.done: set[Task] = set()
        self.writes: list[list[Write]] = [[] for _ in range(tiles_n1(config))]
        self._allocate()

    def _allocate(self) -> None:
        c, tokens = self.config, [len(part) for part in self.x]
        self.topk_idx = [np.full((n, c.num_topk), -1, np.int32) for n in tokens]
        self.topk_weights = [np.full((n, c.num_topk), np.nan, c.accumulator) for n in tokens]
        self.y = [np.full((n, c.hidden), np.nan, c.numpy_dtype) for n in tokens]
        self._segments = [np.zeros(self.layout.num_bytes, np.uint8) for _ in tokens]
        for rank in range(c.num_ranks):
            self._region(rank, DISPATCH)[:] = np.nan
            self._region(rank, RESULT)[:] = np.nan
        self._tiles = {
            (*divmod(expert, c.num_experts_per_rank), tile.peer, tile.m): tile
            for expert, tiles in enumerate(self.tiles)
            for tile in tiles
        }
        self._hidden = {
            name: np.full((tile.num_rows, c.ffn), np.nan, c.numpy_dtype) for name, tile in self._tiles.items()
        }
        self._shared_hidden = [np.full((n, c.shared_ffn), np.nan, c.numpy_dtype) for n in tokens]
        self._shared_result = [np.full((n, c.hidden), np.nan, c.numpy_dtype) for n in tokens]

    def _region(self, rank: int, round: int) -> Array:
        """`[num_ranks, num_experts_per_rank, slots, hidden]`: a region of a rank's segment."""
        c = self.config
        start = self.layout.dispatch if round == DISPATCH else self.layout.result
        stop = start + self.layout.region_elements * c.format.num_bytes
        rows = self._segments[rank][start:stop].view(c.numpy_dtype)
        return rows.reshape(c.num_ranks, c.num_experts_per_rank, c.slots, c.hidden)

    def _dispatch_flags(self, rank: int) -> Array:
        """`[num_ranks, num_experts_per_rank]` words of a rank's segment, for its only epoch."""
        start, c = self.layout.dispatch_flag, self.config
        words = self._segments[rank][start : start + 8 * self.layout.num_dispatch_flags].view(np.int64)
        return words.reshape(c.num_ranks, c.num_experts_per_rank, 2)[..., EPOCH & 1]

    def run(self, order_rng: np.random.Generator) -> list[Array]:
        """Runs all tasks not yet done, each time a random one of those that are ready; returns `y`."""
        dependents = defaultdict(list)
        missing = {task: sum(need not in self.done for need in needs) for task, needs in self.graph.items()}
        for task, needs in self.graph.items():
            for need in needs:
                dependents[need].append(task)
        ready = [task for task, count in missing.items() if count == 0 and task not in self.done]
        while ready:
            pick = int(order_rng.integers(len(ready)))
            ready[pick], ready[-1] = ready[-1], ready[pick]
            task = ready.pop()
            self.execute(task)
            for dependent in dependents[task]:
                missing[dependent] -= 1
                if missing[dependent] == 0:
                    ready.append(dependent)
        assert len(self.done) == len(self.graph), "the task graph has a cycle"
        return self.y

    def execute(self, task: Task) -> None:
        """Runs one task.

        Raises:
            ValueError: it is no task of this layer, was run before, or a task that it waits for was not.
        """
        if task not in self.graph:
            raise ValueError(f"task must be one of this layer's, got {task}")
        if task in self.done:
            raise ValueError(f"task must run once, got {task} again")
        for need in self.graph[task]:
            if need not in self.done:
                raise ValueError(f"task must run after those it waits for, got {task} before {need}")
        bodies = (
            self._gate, self._dispatch, self._gemm0, self._gemm1, self._combine, self._shared0, self._shared1
        )  # by kind  # fmt: skip
        with np.errstate(invalid="ignore", over="ignore"):
            bodies[task.kind](task)
        self.done.add(task)

    def conflicts(self) -> list[tuple[Write, Write]]:
        """Pairs of writes so far that touch the same cells."""
        return [pair for writes in self.writes for pair in write_conflicts(self.layout, writes)]

    def _token_block(self, m: int) -> slice:
        return slice(m * self.config.token_block, (m + 1) * self.config.token_block)

    def _routing(self, rank: int, m: int) -> Routing:
        """The routing of one token block: a function of the inputs, so that it can be planned before it is gated."""
        block, c = self._token_block(m), self.config
        if self._external is not None:
            given = self._external[rank]
            return Routing(given.topk_idx[block], given.topk_weights[block])
        with np.errstate(invalid="ignore", over="ignore"):
            logits = self.x[rank][block].astype(c.accumulator) @ self.weights.router.astype(c.accumulator).T
        return choose(logits, c.router_kind, c.num_topk, self.weights)

    def _planned_topk_idx(self, rank: int) -> Array:
        blocks = range(num_token_blocks(len(self.x[rank]), self.config))
        none = np.empty((0, self.config.num_topk), np.int32)
        return np.concatenate([none, *(self._routing(rank, m).topk_idx for m in blocks)])

    def _gate(self, task: Task) -> None:
        routing, block = self._routing(task.rank, task.m), self._token_block(task.m)
        self.topk_idx[task.rank][block] = routing.topk_idx
        self.topk_weights[task.rank][block] = routing.topk_weights

    def _dispatch(self, task: Task) -> None:
        c = self.config
        expert, weights = task.peer * c.num_experts_per_rank + task.expert, self.topk_weights[task.rank]
        pairs = np.flatnonzero(self.topk_idx[task.rank] == expert)[: c.slots]  # token order; the rest is dropped
        for slot, token in enumerate((pairs // c.num_topk).tolist()):
            write = Write(task.rank, task.peer, DISPATCH, task.rank, task.expert, slot)
            factor = weights[token][self.topk_idx[task.rank][token] == expert]
            row = expert_input(self.x[task.rank][token], factor, c)
            self._store(write, 0, row.astype(c.numpy_dtype))
        self._dispatch_flags(task.peer)[task.rank, task.expert] = EPOCH << 32 | len(pairs)

    def _gemm0(self, task: Task) -> None:
        c, tile = self.config, self._tiles[_tile_name(task)]
        place = self._place(task, c.tile_ffn)
        x = self._gather(task, tile)
        hidden = activate([linear(x, *up, place, c.accumulator) for up in self.weights.ups], c.expert_kind)
        self._hidden[_tile_name(task)][:, place[1]] = hidden.astype(c.numpy_dtype)

    def _gemm1(self, task: Task) -> None:
        c, w, tile = self.config, self.weights, self._tiles[_tile_name(task)]
        place = self._place(task, c.tile_n)
        results = linear(self._hidden[_tile_name(task)], w.down_proj, w.down_bias, place, c.accumulator)
        places = [(run.source, slot) for run in tile.runs for slot in run.slots]
        for (source, slot), row in zip(places, results.astype(c.numpy_dtype), strict=True):
            self._store(Write(task.rank, source, RESULT, task.rank, task.expert, slot), task.n, row)

    def _combine(self, task: Task) -> None:
        c, rank, block = self.config, task.rank, self._token_block(task.m)
        idx, slot, weight = self.topk_idx[rank][block], self.packets[rank].slot[block], self.topk_weights[rank][block]
        results = self._region(rank, RESULT)
        total = np.zeros((len(idx), c.hidden), c.accumulator)
        for j in range(c.num_topk):
            owner, local = np.divmod(idx[:, j], c.num_experts_per_rank)
            zero = idx[:, j] >= c.num_experts
            result = results[np.where(zero, 0, owner), local, slot[:, j]].astype(c.accumulator)
            term = expert_term(normalize(result, self.weights, c.expert_kind), weight[:, j, None], c)
            total += np.where((slot[:, j] >= 0)[:, None], term, 0)
            there = zero & (c.zero == "identity") & (weight[:, j] != 0)
            total += np.where(there[:, None], weight[:, j, None] * self.x[rank][block].astype(c.accumulator), 0)
        if c.shared_ffn:
            factor = self._shared_factors(rank, block)
            total += np.where(factor != 0, factor * self._shared_result[rank][block].astype(c.accumulator), 0)
        self.y[rank][block] = total.astype(c.numpy_dtype)

    def _shared_factors(self, rank: int, tokens: slice) -> Array:
        """`[tokens, 1]`: of the shared expert's results."""
        c, x, gate = self.config, self.x[rank][tokens], self.weights.shared_gate_weight
        if gate is None:
            return np.ones((len(x), 1), c.accumulator)
        return sigmoid(linear(x, gate[None, None], None, 0, c.accumulator))

    def _shared0(self, task: Task) -> None:
        c, shared = self.config, self.weights.shared
        assert shared is not None
        rows = _rows(shared_row_tiles(len(self.x[task.rank]), c)[task.m])
        place = 0, slice(task.n * c.tile_ffn, (task.n + 1) * c.tile_ffn)
        x = self.x[task.rank][rows]
        hidden = activate([linear(x, *up, place, c.accumulator) for up in shared.ups], c.shared_kind)
        self._shared_hidden[task.rank][rows, place[1]] = hidden.astype(c.numpy_dtype)

    def _shared1(self, task: Task) -> None:
        c, shared = self.config, self.weights.shared
        assert shared is not None
        rows = _rows(shared_row_tiles(len(self.x[task.rank]), c)[task.m])
        place = 0, slice(task.n * c.tile_n, (task.n + 1) * c.tile_n)
        hidden = self._shared_hidden[task.rank][rows]
        results = linear(hidden, shared.down_proj, shared.down_bias, place, c.accumulator)
        self._shared_result[task.rank][rows, place[1]] = results.astype(c.numpy_dtype)

    def _gather(self, task: Task, tile: RowTile) -> Array:
        """`[rows, hidden]`: the rows of a tile, of whose packets the flags say that they are here."""
        here, packets = self._dispatch_flags(task.rank)[:, task.expert] & ROWS_MASK, self._region(task.rank, DISPATCH)
        assert all(run.slots.stop <= here[run.source] for run in tile.runs), f"{task} has rows that did not come"
        runs = [packets[run.source, task.expert, run.first : run.slots.stop] for run in tile.runs]
        return np.concatenate(runs)

    def _place(self, task: Task, tile_columns: int) -> tuple[int, slice]:
        """The task's expert, and the columns of its column tile."""
        expert = task.rank * self.config.num_experts_per_rank + task.expert
        return expert, slice(task.n * tile_columns, (task.n + 1) * tile_columns)

    def _store(self, write: Write, column_tile: int, values: Array) -> None:
        """One row, or the part of it in one column tile, to where the layout says."""
        segment, offset = self.layout.offset(write)
        start = offset + column_tile * self.config.tile_n * values.itemsize
        self._segments[segment][start : start + values.nbytes] = np.ascontiguousarray(values).view(np.uint8)
        self.writes[column_tile].append(write)


def _rows(tokens: range) -> slice:
    return slice(tokens.start, tokens.stop)


def _tile_name(task: Task) -> tuple[int, int, int, int]:
    """Of the row tile that a GEMM task is of."""
    return task.rank, task.expert, task.peer, task.m
