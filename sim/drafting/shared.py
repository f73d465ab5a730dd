"""The shared expert: products of each rank's own tokens, of which nothing is sent.

As kernels, one after the other, where a schedule is made of kernels; each policy says where they stand.

In a persistent kernel, as tiles in the queue in which all its tiles are. Packets for other ranks are to leave first: as
many of the first product's tiles as there are slots without a gate tile are queued at the start, and all others behind
the dispatches of the rank. Source: flashmoe_numba/kernel/shared.py.

Leaves out: the product with the one column of the shared expert's gate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ..engine.graph import Array
from ..engine.kinds import ELEMENTWISE, SHARED0, SHARED1
from .draft import Draft

Begin = Callable[[ArrayLike | None], Array]
After = TypeVar("After", bound=Array | None)


def shared_kernels(
    draft: Draft, after: After, tile: tuple[int, int], begin: Begin | None = None, priority: int = 0
) -> Array | After:
    """`[num_ranks]`: both products, and the activation between them, are complete; `after`, if there is no such expert.

    Args:
        tile: rows and columns.
        begin: what begins a kernel after another, by default `draft.begin`.
        priority: of the products' tiles.
    """
    config, tokens = draft.world.config, draft.world.routing.num_tokens
    if not config.shared_ffn:
        return after
    begun = begin or draft.begin
    tile = min(tile[0], tokens), tile[1]
    row_tiles = -(-tokens // tile[0])

    def product(kind: int, before: Array | None) -> Array:
        count = np.full(row_tiles, draft.column_tiles(kind, tile[1]))
        nodes = _product(draft, kind, count, tile, priority=priority)
        return draft.kernel(begun(before), nodes.ravel(), np.repeat(draft.ranks, row_tiles))

    hidden = product(SHARED0, after)
    nbytes = tokens * config.shared_ffn * draft.now.activation / 2
    active = draft.stream(begun(hidden), np.full(draft.world.num_ranks, nbytes), ELEMENTWISE)
    return product(SHARED1, active)


def shared_tiles(draft: Draft, launched: Array, gated: Array, combined: Array, tile: tuple[int, int]) -> list[Array]:
    """Adds the tiles of all ranks to a persistent kernel; returns those of the first product, `[num_ranks, some]` each.

    Args:
        launched, gated: `[num_ranks]`, what the tiles that are queued first and the others wait for.
        combined: `[num_ranks, num_token_blocks]`, the COMBINEs, which wait for the rows of their tokens.
        tile: rows and columns.
    """
    tokens = draft.world.routing.num_tokens
    tile_m, tile_n = tile
    first = np.arange(0, tokens, tile_m)  # of each row tile
    up = draft.column_tiles(SHARED0, tile_n)
    early = min(len(first) * up, max(draft.cost.slots - -(-tokens // draft.token_block), 0))
    at_once = early // len(first) + (np.arange(len(first)) < early % len(first))  # column tiles of each row tile
    down = _product(draft, SHARED1, np.full(len(first), draft.column_tiles(SHARED1, tile_n)), tile)
    hidden = []
    for count, before in ((at_once, launched), (up - at_once, gated)):
        some = np.flatnonzero(count)
        hidden.append(draft.after(before[:, None], _product(draft, SHARED0, count, tile, some)))
        draft.builder.edge(hidden[-1], down[:, some])
    for block in range(combined.shape[1]):
        last = min((block + 1) * draft.token_block, tokens) - 1
        needed = slice(block * draft.token_block // tile_m, last // tile_m + 1)
        draft.builder.edge(down[:, needed], combined[:, block, None])
    return hidden


def _product(
    draft: Draft,
    kind: int,
    count: Array,
    tile: tuple[int, int],
    some: Array | None = None,
    priority: int = 0,
) -> Array:
    """`[num_ranks, row tiles]`: so many column tiles of each row tile, or of some, of a product."""
    tokens, (columns, depth) = draft.world.routing.num_tokens, draft.product_shape(kind)
    tile_m, tile_n = tile[0], min(tile[1], columns)
    m = np.arange(len(count)) if some is None else some
    of_all = len(count) * -(-columns // tile_n)
    rows, reuse = np.minimum(tile_m, tokens - m * tile_m), draft.cost.reuse(len(count), columns, depth, tile_n)
    flops = 2 * depth * columns / -(-columns // tile_n)
    return draft.builder.add(
        kind,
        draft.ranks[:, None],
        m=m,
        count=count[m],
        server=draft.machine.sm[:, None],
        duration_ns=draft.cost.tile(tile_m, tile_n, depth, of_all, reuse),
        flops=flops * tile_m,
        useful_flops=flops * rows,
        priority=priority,
    )
