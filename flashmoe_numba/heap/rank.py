"""One rank's side of a layer: its arrays for the kernel, made once, and the arguments of one call.

Knows the kernel's state groups; knows neither threads nor processes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import Hosts, MoEConfig, Routing, Weights
from reference.arrays import Array
from reference.backward_plan import max_weight_tasks
from reference.runs import RowTile

from ..kernel.backward.arguments import BackwardArguments
from ..kernel.grid import RankArguments
from ..kernel.signals import backward_of
from ..kernel.state import Experts, Problem, Received, Segments, Tokens
from ..processes.ownership import Owned
from .arrays import make_queue, make_received, make_segments, make_tokens, make_traces
from .back import BackCall, Transposed, Working, back_of, make_working, num_weight_tasks, zero_gradients
from .cut import read_tiles
from .kept import Keeping, Kept
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
        save: one of SAVES, if calls can have a backward.
        hosts: which ranks share one; None: all do.
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
        save: str | None = None,
        hosts: Hosts | None = None,
    ) -> None:
        self.save, hosts = save, hosts or Hosts.one(config.num_ranks)
        self.config, self.rank_idx, self.num_processors, self._memory = config, rank_idx, num_processors, memory
        self.segments = make_segments(config, rank_idx, segments, memory, save, hosts)
        self.received = make_received(config, memory)
        self.tokens = make_tokens(config, memory)
        self.working = None if save is None else make_working(config, save, memory)
        self.packing = Packing(config, memory, self.segments, self.tokens, self.received, self.working)
        self.experts = self.packing.pack(weights)
        self.queue = make_queue(config, memory, max_weight_tasks(config) if save else 0)
        self.traces = make_traces(num_processors + 1, trace_events, memory)
        self.left = memory.zeros(1, np.int64)
        self.problem = fixed_problem(config, rank_idx, num_processors, packed, save, not hosts.is_one)
        self.last_tokens = self.tokens  # of the last call
        self.keeping = None if save is None else Keeping(config, save, memory, self.tokens)
        self.kept: Kept  # by the last call that did

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
        keep: bool = False,
    ) -> tuple[Any, RankArguments]:
        """(y, what the blocks of this call are given): y is filled once all have run.

        Args:
            x: `[num_tokens, hidden]`, as `check_tokens` of the memory returns it.
            routing: one from outside, or None.
            topk_idx: `[num_tokens, num_topk]` from outside, -1 for no choice: for a router with choice "given".
            logits: `[num_tokens, num_choices]` from outside, for the router.
            experts: weights that `packing` returned, or None for the rank's own.
            keep: for a backward: what is kept is `self.kept` then.
        """
        x_storage, y_storage, y = self._memory.adopt(x)
        tokens, received = self.tokens._replace(x=x_storage, y=y_storage), self.received
        if keep:
            assert self.keeping is not None, "the layer was made for it"
            self.kept = self.keeping.take(x_storage, routing is not None, logits is not None)
            tokens, received = self.kept.in_tokens(tokens), self.kept.in_received(received)
        self.last_tokens = tokens
        if routing is not None:
            self._store(tokens.topk_idx, routing.topk_idx)
            self._store(tokens.topk_weights, routing.topk_weights)
        if topk_idx is not None:
            self._store(tokens.topk_idx, topk_idx)
        if logits is not None:
            self._store(tokens.logits, logits)
        if self.config.shared_ffn:
            self._memory.aim((experts or self.experts).shared_up, tokens.x)
        given = dict(routed=routing is not None, has_logits=logits is not None)
        problem = self.problem._replace(epoch=epoch, num_tokens=len(x), deadline_ns=deadline_ns, keeps=keep, **given)
        return y, self._arguments(problem, tokens, received, experts)

    def call_back(
        self, call: BackCall, epoch: int, deadline_ns: int
    ) -> tuple[tuple[Any, Array, Array | None], BackwardArguments]:
        """((dx, gradients of the pairs' weights, of logits), what the blocks are given): filled once all have run."""
        c, memory, kept = self.config, self._memory, call.kept
        assert self.working is not None, "the layer was made for it"
        tokens, received = self._kept_or_again(kept, self.working)
        self.last_tokens = tokens
        dy, dx_storage, dx = memory.adopt(call.dy)
        pairs, logits = (memory.empty(kept.num_tokens * width, c.accumulator) for width in (c.num_topk, c.num_choices))
        self._store(self.working.num_rows, np.array([kept.num_tokens]))
        self._aim_back(call, tokens, received, dy)
        back = back_of(
            self.working, call.transposed, dy=dy, dx=dx_storage, said=self._said(call), kept_logits=tokens.kept_logits,
            weight_gradients=pairs, logits_gradient=logits,
        )  # fmt: skip
        arguments = self._arguments(self._problem_back(call, epoch, deadline_ns), tokens, received, call.experts)
        of_logits = None if kept.routed else logits.reshape(kept.num_tokens, c.num_choices)
        found = dx, pairs.reshape(kept.num_tokens, c.num_topk), of_logits
        return found, BackwardArguments(arguments, back, call.gradients)

    def _kept_or_again(self, kept: Kept, working: Working) -> tuple[Tokens, Received]:
        """What the forward left, and room for what it did not keep."""
        tokens, received = kept.in_tokens(self.tokens), kept.in_received(self.received)
        if self.save != "rows+up":
            tokens = tokens._replace(shared_ups=working.shared_ups)
            received = received._replace(kept_ups=working.kept_ups)
        if self.save == "nothing":
            received = received._replace(kept_rows=working.kept_rows)
        return tokens, received

    def _said(self, call: BackCall) -> Array:
        """Gradients of logits by way of other losses, in this memory; empty, if there are none."""
        said = self._memory.empty(0 if call.said is None else call.said.size, self.config.accumulator)
        if call.said is not None:
            self._store(said, call.said)
        return said

    def _problem_back(self, call: BackCall, epoch: int, deadline_ns: int) -> Problem:
        kept = call.kept
        return self.problem._replace(
            epoch=epoch,
            call=backward_of(call.forward),
            num_tokens=kept.num_tokens,
            deadline_ns=deadline_ns,
            routed=kept.routed,
            has_logits=kept.has_logits,
            recomputes=self.save != "rows+up",
            resends=self.save == "nothing",
            fresh=call.fresh,
            **num_weight_tasks(self.config, call.gradients, kept),
        )

    def _aim_back(self, call: BackCall, tokens: Tokens, received: Received, dy: Array) -> None:
        """Say of weights that multiply other rows in each backward which."""
        if self.save != "rows+up":
            rows = received.kept_rows if self.save == "rows" else self.segments.again
            self._memory.aim(call.transposed.up_again, rows)
        if self.config.shared_ffn:
            self._memory.aim(call.transposed.shared_down, dy)
            self._memory.aim(call.experts.shared_up, tokens.x)

    def idle_experts(self) -> Array:
        """`[experts_per_rank]`: which of them had no rows in the last call?"""
        rows = self._memory.to_host(self.received.rows).reshape(self.config.num_ranks, -1)
        idle: Array = rows.sum(axis=0) == 0
        return idle

    def _store(self, target: Array, values: Array) -> None:
        self._memory.store(target[: values.size], values.reshape(-1))

    def first_arguments(self) -> RankArguments:
        """What blocks are given before any call, with tokens of size 0."""
        return self._arguments(self.problem, self.last_tokens, self.received)

    def to_host(self, array: Array) -> Array:
        """A copy, when all work on it so far is done."""
        return self._memory.to_host(array)

    def kept_bytes(self) -> int:
        """Of what the last call kept."""
        assert self.keeping is not None, "the layer was made for it"
        return self.keeping.num_bytes(self.kept, self.received)

    def first_backward(self, weights: Weights, transposed: Transposed) -> BackwardArguments:
        """What blocks are given in a backward before any call: arguments of the types that all have."""
        none = self._memory.no_tokens(self.config)
        self.call(none, None, 0, 0, keep=True)
        gradients = zero_gradients(self.config, weights, self._memory)
        assert self.keeping is not None, "the layer was made for it"
        self.keeping.give_back(self.kept)
        return self.call_back(BackCall(none, None, self.kept, 0, self.experts, transposed, gradients), 0, 0)[1]

    def _arguments(
        self, problem: Problem, tokens: Tokens, received: Received, experts: Experts | None = None
    ) -> RankArguments:
        groups = problem, self.segments, experts or self.experts, tokens, received, self.queue
        return RankArguments(*groups, traces=self.traces, left=self.left)

    def leaving(self, epoch: int) -> tuple[Problem, Segments]:
        """Arguments of `kernel.leave`."""
        return self.problem._replace(epoch=epoch), self.segments

    def routing(self, num_tokens: int) -> Routing:
        """A copy of the last call's routing."""
        return read_routing(self.last_tokens, num_tokens, self.config, self._memory)

    def stats(self, epoch: int, num_tokens: int) -> Stats:
        return read_stats(self.first_arguments(), epoch, num_tokens, self.config, self._memory)

    def row_tiles(self, epoch: int) -> list[list[RowTile]]:
        """Of each of this rank's experts in the last call."""
        return read_tiles(self.received, epoch, self.config, self._memory.to_host)
