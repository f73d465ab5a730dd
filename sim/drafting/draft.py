"""What schedules are drafted with: a builder with a world's resources, and the pieces that several schedules share.

`Draft` methods add nodes for all ranks at once and return their indices, by rank (`rank_draft.py`), by row block or by
piece; `after` is what must be complete before, broadcast against the new nodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..engine.graph import Array
from ..engine.kinds import COMBINE, DISPATCH, ELEMENTWISE, GEMM0, GEMM1, SEND
from .blocks import Blocks
from .rank_draft import RankDraft

TUNED_WIDTHS = range(16, 257, 8)  # that DeepGEMM tries, of tiles


class Draft(RankDraft):
    """A graph in the making, on a world's machine whose GPUs run `sm_slots` tasks at a time: packets and products."""

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
        usual |= self.cost.node_of_tile(*tile)
        if source is not None:
            nbytes = blocks.rows * columns / tiles * self.world.precision.result_bytes
            usual |= {"peer": source} | self.machine.transfer(owner, source, nbytes)
            usual["duration_ns"] = np.asarray(usual["duration_ns"]) + self.machine.carried_ns(owner, source, nbytes)
        return self.builder.add(
            kind,
            owner,
            expert=self.local[blocks.expert],
            m=blocks.m,
            server=self.machine.sm[owner],
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
