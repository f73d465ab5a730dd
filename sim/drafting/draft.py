"""What schedules are drafted with: a builder with a world's resources, and the pieces that several schedules share.

`Draft` methods add nodes for all ranks at once and return their indices, by rank, by row block or by piece; `after` is
what must be complete before, broadcast against the new nodes.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..engine.graph import Array, GraphBuilder
from ..engine.kinds import BARRIER, COMBINE, DISPATCH, ELEMENTWISE, GATE, GEMM0, GEMM1, JOIN, LAUNCH, PERMUTE, SEND
from ..world.routing import ZERO
from ..world.world import World
from .blocks import Blocks
from .cost import Cost
from .knobs import PolicyKnobs
from .machine import add_machine
from .passes import Pass, forward_pass
from .rates import fitted_rate

SPLIT_DEPTH = 128  # of a router's product that is split, at least; assumption
COUNT_BYTES = 8  # of one expert's count on its way
TUNED_WIDTHS = range(16, 257, 8)  # that DeepGEMM tries, of tiles


class Draft:
    """A graph in the making, on a world's machine whose GPUs run `sm_slots` tasks at a time."""

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

    def parts(self, number: int) -> list[Draft]:
        """Drafts of the same graph, on the same resources, each for an equal part of every rank's tokens."""
        tokens = self.world.routing.num_tokens
        ends = [tokens * part // number for part in range(number + 1)]
        return [self._part(slice(*pair)) for pair in pairwise(ends)]

    def _part(self, tokens: slice) -> Draft:
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

    def turned(self, to: Pass) -> Draft:
        """A draft of the same graph, on the same resources, whose products are those of another pass."""
        draft = copy(self)
        draft.now = to
        return draft

    def on(self, sm: Array, slots: int) -> Draft:
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

    # ---- by packet, row block and piece

    def send(self, kind: int, source: Array, target: Array, nbytes: ArrayLike, **fields: ArrayLike) -> Array:
        """Tasks of `source` after which `nbytes` each go to `target`; they take no slots, unless fields say so."""
        return self.builder.add(kind, source, peer=target, **fields, **self.machine.transfer(source, target, nbytes))

    def store(
        self, kind: int, source: Array, target: Array, nbytes: Array, first_ns: ArrayLike = 0, **fields: ArrayLike
    ) -> Array:
        """Tasks whose slots at `source` store `nbytes` each to `target`, after `first_ns` of something else."""
        time = first_ns + self.cost.store(nbytes, source == target)
        return self.send(kind, source, target, nbytes, server=self.machine.sm[source], duration_ns=time, **fields)

    def dispatch(self, after: Array, packets: tuple[Array, ...], rows_per_task: int, priority: int = 0) -> Array:
        """`[packets]`: slots store the rows of the packets (source, expert) to their owners and signal each task."""
        source, expert = packets
        owner = self.world.routing.owner[expert]
        rows = self.world.routing.counts[source, expert] * self.now.copies
        tasks = np.maximum(1, -(-rows // rows_per_task))
        nbytes = rows / tasks * self.world.config.hidden * self.world.precision.token_bytes
        local = self.local[expert]
        nodes = self.store(DISPATCH, source, owner, nbytes, expert=local, count=tasks, priority=priority)
        return self.after(after[source], nodes)

    def product_shape(self, kind: int) -> tuple[int, int]:
        """Columns and depth of a product of this pass: GEMM0 or GEMM1, or of the shared expert, SHARED0 or SHARED1."""
        return self.now.shapes[kind]

    def column_tiles(self, kind: int, tile_n: int) -> int:
        """Tiles of a row block."""
        return -(-self.product_shape(kind)[0] // tile_n)

    def tuned_width(self, kind: int, blocks: Blocks, tile_m: int, tile_n: int, slots: int | None = None) -> int:
        """The columns of a product's tiles: `tile_n`, or where tiles are lower than `tile_m` those that fill the waves.

        Fewest waves on the busiest GPU, then the fullest last one, then the widest: DeepGEMM's rule, and that of others
        (get_best_configs there; TensorRT-LLM's heuristic for CUTLASS goes by waves, too).

        Args:
            slots: of the server that runs them, by default all.
        """
        if blocks.height.size == 0 or blocks.height.max() >= tile_m:
            return tile_n
        owner = self.world.routing.owner
        most = int(np.bincount(owner[blocks.expert]).max())
        slots = slots or self.cost.slots

        def rank(width: int) -> tuple[int, int, int]:
            tiles = most * self.column_tiles(kind, width)
            return -(-tiles // slots), -((tiles - 1) % slots), -width

        return min(TUNED_WIDTHS, key=rank)

    def tile_ns(self, kind: int, expert: Array, height: Array, rows: Array, blocks: Blocks, tile_n: int) -> Array:
        """How long a tile of this expert, height and real rows takes where `blocks` are all that there are, at a fixed
        share of the memory; all are broadcast.
        """
        return self.cost.tile(*self._tile(kind, expert, height, rows, blocks, tile_n))

    def _tile(
        self, kind: int, expert: Array, height: Array, rows: Array, blocks: Blocks, tile_n: int
    ) -> tuple[Any, ...]:
        """What `Cost` asks of it."""
        columns, depth = self.product_shape(kind)
        owner = self.world.routing.owner
        row_blocks = np.bincount(blocks.expert, minlength=len(owner))
        tiles = self.column_tiles(kind, tile_n)
        on_gpu = np.bincount(owner[blocks.expert], minlength=self.world.num_ranks) * tiles
        reuse = self.cost.reuse(row_blocks[expert], columns, depth, min(tile_n, columns))
        moved = rows * (self.now.moved.get(kind, 0.0) / tiles)
        return height, min(tile_n, columns), depth, on_gpu[owner[expert]], reuse, columns / tiles, rows, moved

    def gemm(self, kind: int, blocks: Blocks, tile_n: int, source: Array | None = None, **fields: ArrayLike) -> Array:
        """`[num_blocks]`: the first or second product of each row block; who waits for what is the caller's to say.

        Args:
            kind: GEMM0 or GEMM1.
            source: `[num_blocks]`: each tile goes to that rank when done.
            fields: of the nodes, beside the usual ones or in their place, such as a `count` of column tiles in each
                part of a row block, `[num_parts, 1]`; the result is `[num_parts, num_blocks]` then.
        """
        owner = self.world.routing.owner[blocks.expert]
        columns, depth = self.product_shape(kind)
        tiles = self.column_tiles(kind, tile_n)
        flops = 2 * columns / tiles * depth
        tile = self._tile(kind, blocks.expert, blocks.height, blocks.rows, blocks, tile_n)
        usual: dict[str, ArrayLike] = {"peer": blocks.sources(owner), "count": tiles}
        if source is not None:
            nbytes = blocks.rows * columns / tiles * self.world.precision.result_bytes
            usual |= {"peer": source} | self.machine.transfer(owner, source, nbytes)
        return self.builder.add(
            kind,
            owner,
            expert=self.local[blocks.expert],
            m=blocks.m,
            server=self.machine.sm[owner],
            **self.cost.node_of_tile(*tile),
            flops=flops * blocks.height,
            useful_flops=flops * blocks.rows,
            **(usual | fields),
        )

    def ffn(self, after: ArrayLike, blocks: Blocks, tile_n: int, tile_m: int | None = None) -> tuple[Array, Array]:
        """Three kernels, one after the other: the products, and the activation between them.

        Where `tile_m` is given and blocks are lower, the widths of tiles are tuned as well.

        Returns the second product's nodes `[num_blocks]`, and `[num_ranks]`: all three are complete.
        """
        owner = self.world.routing.owner[blocks.expert]
        first, second = (self.tuned_width(kind, blocks, tile_m or 0, tile_n) for kind in (GEMM0, GEMM1))
        hidden = self.kernel(self.begin(after), self.gemm(GEMM0, blocks, first), owner)
        rows = np.bincount(owner, blocks.rows, self.world.num_ranks)
        nbytes = rows * self.world.config.ffn * self.now.activation / 2
        active = self.stream(self.begin(hidden), nbytes, ELEMENTWISE)
        results = self.gemm(GEMM1, blocks, second)
        return results, self.kernel(self.begin(active), results, owner)

    def send_pieces(self, blocks: Blocks, after: Array, columns: ArrayLike | None = None) -> Array:
        """`[num_pieces]`: the results of each piece go back to its source, once `after` `[num_blocks]` is complete.

        With `columns` `[num_parts, 1]` in each part of a row block, and `after` `[num_parts, num_blocks]`: by parts.
        """
        owner = self.world.routing.owner[blocks.expert[blocks.piece_block]]
        columns = np.asarray(self.world.config.hidden if columns is None else columns)
        nbytes = blocks.piece_rows * columns * self.world.precision.result_bytes
        sends = self.send(SEND, owner, blocks.piece_source, nbytes, m=blocks.m[blocks.piece_block])
        return self.after(after[..., blocks.piece_block], sends)

    def combine(
        self, blocks: Blocks, results: Array, gated: Array, beside_ns: ArrayLike = 0, **fields: ArrayLike
    ) -> Array:
        """`[num_ranks, num_token_blocks]`: a block of tokens is summed when `results` `[num_pieces]` has its rows.

        Zero-computation experts that add the token are rows that are here, as that of the shared expert is. A task does
        something else for `beside_ns`, of which `fields` say more.
        """
        routing, block = self.world.routing, self.token_block
        number = -(-routing.num_tokens // block)
        start = np.arange(number) * block
        tokens = np.minimum(block, routing.num_tokens - start)
        rows = np.add.reduceat(self.rows_to_sum(), start, axis=1)
        nodes = self.builder.add(
            COMBINE,
            self.ranks[:, None],
            m=np.arange(number),
            server=self.machine.sm[:, None],
            duration_ns=self.cost.combine(tokens, rows, number) + beside_ns,
            **fields,
        )
        found, pieces = blocks.combine_pieces(routing, block)
        self.builder.edge(results[pieces], nodes[found.rank, found.block])
        self.builder.edge(gated[:, None], nodes)  # for a block that lost all its rows
        return nodes
