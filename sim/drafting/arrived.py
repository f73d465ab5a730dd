"""What schedules add for row blocks that are cut as packets arrive: when they begin, what their sources are told."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..engine.graph import NONE, Array
from ..engine.kinds import GEMM1, JOIN
from .blocks import Blocks, blocks_per_source, ladder
from .cuts import CutBlocks, chunk_pieces
from .draft import Draft

SHORTEST = 16  # of the ladder


def row_blocks_at_once(blocks: Blocks) -> Array:
    """`[num_ranks, num_experts]`: row blocks that are handed out when a packet arrives."""
    shape = blocks.piece_start.shape
    if isinstance(blocks, CutBlocks):
        at_once = blocks.held_ns == NONE
        packet = blocks.last_source[at_once] * shape[1] + blocks.expert[at_once]
        at_once_of: Array = np.bincount(packet, minlength=blocks.piece_start.size).reshape(shape)
        return at_once_of
    share = 1 / np.bincount(blocks.piece_block)[blocks.piece_block]
    total = np.append(0, np.cumsum(share))
    result: Array = np.diff(total[np.append(blocks.piece_start.ravel(), len(share))]).reshape(shape)
    return result


def hold_back(draft: Draft, received: Array, blocks: CutBlocks, hidden: Array) -> None:
    """Rests wait for idle processors, counted from the last packet in them."""
    held = np.flatnonzero(blocks.held_ns != NONE)
    expert, source = blocks.expert[held], blocks.last_source[held]
    waits = draft.builder.add(
        JOIN,
        draft.world.routing.owner[expert],
        peer=source,
        expert=draft.local[expert],
        m=blocks.m[held],
        duration_ns=blocks.held_ns[held],
    )
    draft.builder.edge(received[source, expert], waits)
    draft.builder.edge(waits, hidden[held])


def told_by_chunks(draft: Draft, blocks: CutBlocks, hidden: Array, tile_m: int, tile_n: int) -> tuple[Blocks, Array]:
    """A source is told of a chunk of its packet when all blocks that hold rows of it have stored them."""
    counts, owner = draft.world.routing.counts, draft.world.routing.owner
    alone = np.bincount(blocks.piece_block, minlength=len(blocks.expert)) == 1
    target = np.where(alone, blocks.last_source, owner[blocks.expert])
    down = draft.after(hidden, draft.gemm(GEMM1, blocks, tile_n, source=target, peer=blocks.first_source))
    stored, mixed = down[blocks.piece_block], ~alone[blocks.piece_block]
    pieces = {name: getattr(blocks, name)[mixed] for name in ("piece_block", "piece_source", "piece_rows")}
    stored[mixed] = draft.send_pieces(replace(blocks, **pieces), down)
    chunks = blocks_per_source(counts, ladder(counts, min(SHORTEST, tile_m), tile_m))
    expert = chunks.expert[chunks.piece_block]
    told = draft.builder.add(
        JOIN, owner[expert], peer=chunks.piece_source, expert=draft.local[expert], m=chunks.m[chunks.piece_block]
    )
    piece, chunk = chunk_pieces(blocks, chunks)
    draft.builder.edge(stored[piece], told[chunk])
    return chunks, told
