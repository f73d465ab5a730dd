"""One rank's side of a layer: its arrays for the kernel, made once, and the arguments of one call.

Knows the kernel's state groups; knows neither threads nor processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import MoEConfig, Routing, Weights
from reference.arrays import Array
from reference.runs import RowTile

from ..kernel.grid import RankArguments
from ..kernel.state import Experts, Problem, Segments, Tokens
from ..processes.ownership import Owned
from .arrays import make_queue, make_received, make_segments, make_tokens, make_traces
from .cut import read_tiles
from .packing import Packing
from .problem import fixed_problem
from .protocols import Memory
from .stats import Stats, read_routing, read_stats


class Rank(Owned):
    """Arrays of one rank.

    Args:
        weights: the experts of this rank only.
        segments: every rank's segment as bytes, as seen from this process.
        trace_events: events to keep per block and call, 0 for none.
        packed: may a row tile hold rows of several sources?
    """

    def __init__(
        self,
        config: MoEConfig,
        rank_idx: int,
        weights: Weights,
        segments: list[np.ndarray],
        num_processors: int,
        memory: Memory,
        trace_events: int,
        packed: bool = True,
    ) -> None:
        self.config, self.rank_idx, self.num_processors, self._memory = config, rank_idx, num_processors, memory
        self.segments = make_segments(config, rank_idx, segments, memory)
        self.received = make_received(config, memory)
        self.tokens = make_tokens(config, memory)
        self.packing = Packing(config, memory, self.segments, self.tokens, self.received)
        self.experts = self.packing.pack(weights)
        self.queue = make_queue(config, memory)
        self.traces = make_traces(num_processors + 1, trace_events, memory)
        self.left = memory.zeros(1, np.int64)
        self.problem = fixed_problem(config, rank_idx, num_processors, packed)

    @property
    def control(self) -> np.ndarray:
        return self.segments.control

    def call(
        self,
        x: Any,
        routing: Routing | None,
        epoch: int,
        deadline_ns: int,
        topk_idx: Array | None = None,
        logits: Array | None = None,
        experts: Experts | None = None,
    ) -> tuple[Any, RankArguments]:
        """(y, what the blocks of this call are given): y is filled once all have run.

        Args:
            x: `[num_tokens, hidden]`, as `check_tokens` of the memory returns it.
            routing: one from outside, or None.
            topk_idx: `[num_tokens, num_topk]` from outside, -1 for no choice: for a router with choice "given".
            logits: `[num_tokens, num_choices]` from outside, for the router.
            experts: weights that `packing` returned, or None for the rank's own.
        """
        x_storage, y_storage, y = self._memory.adopt(x)
        tokens = self.tokens._replace(x=x_storage, y=y_storage)
        if routing is not None:
            self._store(tokens.topk_idx, routing.topk_idx)
            self._store(tokens.topk_weights, routing.topk_weights)
        if topk_idx is not None:
            self._store(tokens.topk_idx, topk_idx)
        if logits is not None:
            self._store(tokens.logits, logits)
        if self.config.shared_ffn:
            self._memory.aim((experts or self.experts).shared_up, x_storage)
        given = dict(routed=routing is not None, has_logits=logits is not None)
        problem = self.problem._replace(epoch=epoch, num_tokens=len(x), deadline_ns=deadline_ns, **given)
        return y, self._arguments(problem, tokens, experts)

    def _store(self, target: Array, values: Array) -> None:
        self._memory.store(target[: values.size], values.reshape(-1))

    def first_arguments(self) -> RankArguments:
        """What blocks are given before any call, with tokens of size 0."""
        return self._arguments(self.problem, self.tokens)

    def _arguments(self, problem: Problem, tokens: Tokens, experts: Experts | None = None) -> RankArguments:
        groups = problem, self.segments, experts or self.experts, tokens, self.received, self.queue
        return RankArguments(*groups, traces=self.traces, left=self.left)

    def leaving(self, epoch: int) -> tuple[Problem, Segments]:
        """Arguments of `kernel.leave`."""
        return self.problem._replace(epoch=epoch), self.segments

    def routing(self, num_tokens: int) -> Routing:
        """A copy of the last call's routing."""
        return read_routing(self.tokens, num_tokens, self.config, self._memory)

    def stats(self, epoch: int, num_tokens: int) -> Stats:
        return read_stats(self.first_arguments(), epoch, num_tokens, self.config, self._memory)

    def row_tiles(self, epoch: int) -> list[list[RowTile]]:
        """Of each of this rank's experts in the last call."""
        return read_tiles(self.received, epoch, self.config, self._memory.to_host)
