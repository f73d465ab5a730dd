"""The shared expert of a persistent kernel: tiles of each rank's own tokens, in the queue in which all its tiles are.

Nothing is sent. Packets for other ranks are to leave first: as many of the first product's tiles as there are slots
without a gate tile are queued at the start, and all others behind the dispatches of the rank.

Source: flashmoe_numba/kernel/shared.py. Leaves out: the product with the one column of the shared expert's gate.
"""

from __future__ import annotations

import numpy as np

from ..engine.graph import Array
from ..engine.kinds import SHARED0, SHARED1
from .draft import Draft


def shared_expert(draft: Draft, launched: Array, gated: Array, combined: Array, tile: tuple[int, int]) -> None:
    """Adds the tiles of all ranks.

    Args:
        launched, gated: `[num_ranks]`, what the tiles that are queued first and the others wait for.
        combined: `[num_ranks, num_token_blocks]`, the COMBINEs, which wait for the rows of their tokens.
        tile: rows and columns.
    """
    config, tokens = draft.world.config, draft.world.routing.num_tokens
    tile_m, tile_n = tile
    first = np.arange(0, tokens, tile_m)  # of each row tile
    up = -(-config.shared_ffn * config.expert_kind.num_ups // tile_n)
    early = min(len(first) * up, max(draft.cost.slots - -(-tokens // draft.token_block), 0))
    at_once = early // len(first) + (np.arange(len(first)) < early % len(first))  # column tiles of each row tile
    columns, down_shape = config.shared_ffn * config.expert_kind.num_ups, (config.hidden, config.shared_ffn)
    down = _product(draft, SHARED1, down_shape, np.full(len(first), -(-config.hidden // tile_n)), tile)
    for count, before in ((at_once, launched), (up - at_once, gated)):
        some = np.flatnonzero(count)
        hidden = _product(draft, SHARED0, (columns, config.hidden), count, tile, some)
        draft.after(before[:, None], hidden)
        draft.builder.edge(hidden, down[:, some])
    for block in range(combined.shape[1]):
        last = min((block + 1) * draft.token_block, tokens) - 1
        needed = slice(block * draft.token_block // tile_m, last // tile_m + 1)
        draft.builder.edge(down[:, needed], combined[:, block, None])


def _product(
    draft: Draft, kind: int, shape: tuple[int, int], count: Array, tile: tuple[int, int], some: Array | None = None
) -> Array:
    """`[num_ranks, row tiles]`: so many column tiles of each row tile, or of some, of a product of this shape."""
    tokens, (columns, depth) = draft.world.routing.num_tokens, shape
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
    )
