"""The part of a draft that goes rank by rank: hosts and kernels, meetings, exchanges, and what all slots do together.

`after` is what must be complete before, broadcast against the new nodes.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from ..engine.graph import NONE, Array, GraphBuilder
from ..engine.kinds import BARRIER, COMBINE, GATE, JOIN, LAUNCH, PERMUTE, SEND
from ..world.routing import ZERO
from ..world.world import World
from .cost import Cost
from .knobs import PolicyKnobs
from .machine import add_machine
from .passes import Pass, forward_pass
from .rates import fitted_rate

SPLIT_DEPTH = 128  # of a router's product that is split, at least; assumption
COUNT_BYTES = 8  # of one expert's count on its way


class RankDraft:
    """A graph in the making, and what is added to it for all ranks at once."""

    def __init__(
        self,
        world: World,
        knobs: PolicyKnobs,
        policy: str,
        sm_slots: int,
        *,
        cuda_graph: bool = False,
        **cost: Any,
    ) -> None:
        """The usual parts of a world's machine.

        Args:
            cuda_graph: kernels are nodes of one.
            cost: fields of `Cost` beside the usual ones, or in their place.
        """
        self.world = world
        self.builder = GraphBuilder()
        self.machine = add_machine(self.builder, world, sm_slots)
        rate = fitted_rate(policy, world.hardware.chip) if knobs.rate is None else knobs.rate
        fields = {"rate": rate, "tile_latency_ns": knobs.tile_latency_ns} | cost
        self.cost = Cost(world=world, slots=sm_slots, **fields)
        self.now = forward_pass(world)
        self.builder.set_memory(self.cost.weights_gbps, self.cost.task_gbps)
        self.token_block = knobs.token_block
        self.cuda_graph = cuda_graph
        self.launched: list[Array] = []  # [num_ranks] each, what the hosts do, in order; parts share it
        self.ranks = np.arange(world.num_ranks)
        owner = world.routing.owner
        order = np.argsort(owner, kind="stable")
        self.local = np.empty(len(owner), np.int64)  # index of each expert among its owner's
        self.local[order] = np.arange(len(owner)) - np.searchsorted(owner[order], owner[order])

    def after(self, before: ArrayLike | None, nodes: Array) -> Array:
        """`nodes`, made to wait for `before`."""
        if before is not None:
            self.builder.edge(before, nodes)
        return nodes

    def parts(self, number: int) -> list[Self]:
        """Drafts of the same graph, on the same resources, each for an equal part of every rank's tokens."""
        tokens = self.world.routing.num_tokens
        ends = [tokens * part // number for part in range(number + 1)]
        return [self._part(slice(*pair)) for pair in pairwise(ends)]

    def _part(self, tokens: slice) -> Self:
        world = self.world
        topk_idx = world.routing.topk_idx[:, tokens]
        draft = copy(self)
        draft.world = replace(
            world,
            config=replace(world.config, num_tokens=topk_idx.shape[1], capacity=None),
            routing=replace(world.routing, topk_idx=topk_idx),
        )
        draft.cost = replace(self.cost, world=draft.world)
        return draft

    def turned(self, to: Pass) -> Self:
        """A draft of the same graph, on the same resources, whose products are those of another pass."""
        draft = copy(self)
        draft.now = to
        return draft

    def on(self, sm: Array, slots: int) -> Self:
        """A draft of the same graph whose kernels run on the servers `sm` `[num_ranks]` of `slots` slots each."""
        draft = copy(self)
        draft.machine = replace(self.machine, sm=sm)
        draft.cost = replace(self.cost, slots=slots)
        return draft

    def servers(self, name: str, slots: int) -> Array:
        """`[num_ranks]`: one more server on each rank."""
        return np.array([self.builder.add_server(name, rank, slots) for rank in self.ranks.tolist()])

    # ---- by rank

    def launch(self, after: ArrayLike | None = None, duration_ns: ArrayLike | None = None) -> Array:
        """`[num_ranks]`: the host starts a kernel (or does something else for `duration_ns`)."""
        time = self.world.hardware.launch_ns if duration_ns is None else duration_ns
        return self.after(after, self.builder.add(LAUNCH, self.ranks, server=self.machine.host, duration_ns=time))

    def begin(self, after: ArrayLike | None = None, launch_ns: ArrayLike | None = None) -> Array:
        """`[num_ranks]`: a kernel begins: the host, which does one thing after the other, has launched it.

        `after` is what comes before it in its stream. With `cuda_graph` no host is asked: it begins a while after that.
        """
        if self.cuda_graph:
            return self.gap(after)
        self.launched.append(self.launch(self.launched[-1] if self.launched else None, launch_ns))
        return self.after(after, self.after(self.launched[-1], self.idle()))

    def gap(self, after: ArrayLike | None) -> Array:
        """`[num_ranks]`: what passes between two kernels of a CUDA graph."""
        return self.after(after, self.builder.add(LAUNCH, self.ranks, duration_ns=self.world.hardware.graph_launch_ns))

    def sync(self, after: Array) -> None:
        """The hosts read a result of `after` before they launch more."""
        read = self.launch(self.launched[-1], self.world.hardware.host_sync_ns)
        self.launched.append(self.after(after, read))

    def kernel(self, begun: Array, nodes: Array, rank: Array) -> Array:
        """`[num_ranks]`: a kernel of the tasks `nodes`, each on its `rank`, is complete; a rank may have none."""
        self.builder.edge(begun[rank], nodes)
        return self.after(begun, self.gather(nodes, rank))

    def gate(self, after: ArrayLike | None, split: bool = True) -> Array:
        """`[num_ranks]`: logits and top-k of all tokens of a rank.

        Args:
            split: few blocks of tokens are cut by depth, too, as libraries do, so that all slots read the router.
        """
        config, tokens = self.world.config, self.world.routing.num_tokens
        per_token = 2 * config.num_choices * config.hidden
        blocks = -(-tokens // self.token_block)
        parts = min(max(1, self.cost.slots // blocks), -(-config.hidden // SPLIT_DEPTH)) if split else 1
        depth, count = config.hidden / parts, blocks * parts
        time = self.cost.tile(self.token_block, config.num_choices, depth, tiles=count, reuse=blocks)
        gates = self.builder.add(
            GATE,
            self.ranks,
            server=self.machine.sm,
            count=count,
            duration_ns=time,
            flops=self.token_block * per_token / parts,
            useful_flops=tokens / count * per_token,
        )
        return self.after(after, gates)

    def idle(self) -> Array:
        """`[num_ranks]`: the beginning of time, for what follows nothing."""
        return self.builder.add(JOIN, self.ranks)

    def all_of(self, *before: Array) -> Array:
        """`[num_ranks]`: a rank's part of each is complete."""
        return self.after(before, self.idle())

    def barrier(self, after: ArrayLike, duration_ns: int | None = None) -> Array:
        """`[num_ranks]`, one node: all ranks have met."""
        time = self.world.hardware.barrier_ns if duration_ns is None else duration_ns
        met = self.builder.add(BARRIER, 0, duration_ns=time)
        self.builder.edge(after, met)
        return np.full(self.world.num_ranks, int(met), np.int32)

    def stream(self, after: ArrayLike | None, nbytes: ArrayLike, kind: int = PERMUTE, **fields: ArrayLike) -> Array:
        """`[num_ranks]`: a kernel over all slots that reads and writes `nbytes` `[num_ranks]` within each GPU."""
        slots, sm = self.cost.slots, self.machine.sm
        time = self.cost.stream(np.asarray(nbytes) / slots) + self.cost.tile_latency_ns
        nodes = self.builder.add(kind, self.ranks, server=sm, count=slots, duration_ns=time, **fields)
        return self.after(after, nodes)

    def exchange(self, after: Array, nbytes: Array, latency_ns: int = 0) -> Array:
        """`[num_ranks]`: every rank has what all others sent it; `nbytes` is `[num_ranks, num_ranks]`, from and to.

        `latency_ns` comes before the bytes. The slots of the kernel that sends are not taken: use it where nothing
        runs beside.
        """
        source, target = np.nonzero(nbytes + np.eye(len(nbytes)))
        sends = self.send(SEND, source, target, nbytes[source, target], duration_ns=latency_ns)
        self.builder.edge(after[source], sends)
        return self.gather(sends, target)

    def collective(self, begun: Array, nbytes: Array, floor_ns: int | None = None) -> Array:
        """`[num_ranks]`, one node: an all-to-all that begins when the last rank is there and ends for all at once.

        `nbytes` is `[num_ranks, num_ranks]`, from and to; it takes `floor_ns` at least, else the time of a barrier.
        Nothing is called where there is one rank.
        """
        met = self.barrier(begun, 0)
        floor = self.world.hardware.barrier_ns if floor_ns is None else floor_ns
        return self.barrier(self.exchange(met, nbytes, floor if self.world.num_ranks > 1 else 0), 0)

    def exchange_counts(self, begun: Array, floor_ns: int) -> Array:
        """`[num_ranks]`, one node: every rank knows what it will get, and its host reads that before it goes on."""
        counted = self.collective(begun, self.count_bytes(), floor_ns)
        self.sync(counted)
        return counted

    def count_bytes(self) -> Array:
        """`[num_ranks, num_ranks]`, from and to: how many rows come for each expert."""
        return np.full((self.world.num_ranks, self.world.num_ranks), self.world.experts_per_rank * COUNT_BYTES)

    def gather(self, nodes: Array, rank: Array) -> Array:
        """`[num_ranks]`: joins of the nodes that belong to each rank."""
        joins = self.idle()
        self.builder.edge(nodes, joins[rank])
        return joins

    def combine_kernel(self, after: ArrayLike | None, copies: ArrayLike = 0) -> Array:
        """`[num_ranks]`: one kernel sums the results of all tokens of a rank, and `copies` of tokens with them."""
        rows = self.rows_to_sum().sum(axis=1) + self.world.routing.num_tokens + copies
        nbytes = rows * self.world.config.hidden * self.world.precision.result_bytes
        return self.stream(after, nbytes / 2, COMBINE)

    def rows_to_sum(self) -> Array:
        """`[num_ranks, num_tokens]`: rows that a token's result is the sum of."""
        config, topk_idx = self.world.config, self.world.routing.topk_idx
        there = (topk_idx >= 0) | ((topk_idx == ZERO) & (config.zero == "identity"))
        rows: Array = there.sum(axis=2) + (config.shared_ffn > 0)
        return rows

    def in_window(self, nodes: Array, stream: Array, window: int) -> None:
        """Of the nodes of a stream, in their order, each begins when the one `window` places before is complete.

        `nodes` and `stream` are `[num_nodes]`.
        """
        order = np.argsort(stream, kind="stable")
        before, after = order[:-window], order[window:]
        same = stream[before] == stream[after]
        self.builder.edge(nodes[before[same]], nodes[after[same]])

    def send(self, kind: int, source: Array, target: Array, nbytes: ArrayLike, **fields: ArrayLike) -> Array:
        """Tasks of `source` after which `nbytes` each go to `target`.

        They take no slots, unless fields say so, or cores have to carry the bytes.
        """
        carried = self.machine.carried_ns(source, target, nbytes)
        if carried.any():
            fields = {"server": np.where(carried > 0, self.machine.sm[source], NONE)} | fields
            fields["duration_ns"] = np.asarray(fields.get("duration_ns", 0)) + carried
        return self.builder.add(kind, source, peer=target, **fields, **self.machine.transfer(source, target, nbytes))
