"""Row blocks: which rows share a tile. Per source, as FlashMoE has it, or packed over all sources of an expert.

The rows of one (source, expert) packet follow each other. Per source, a packet begins a row block of its own; packed,
the packets of an expert are laid end to end, in the order of their sources, and cut into blocks of one height. The part
of a packet in one block is a piece: what must arrive for the block, and what goes back to that source from it; the
blocks of tokens that its rows belong to can be combined when it is back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from reference.arrays import check_array

from ..engine.graph import Array
from ..world.routing import SimRouting, packet_slots


@dataclass(frozen=True, eq=False)
class Blocks:
    """Row blocks `[num_blocks]` and pieces `[num_pieces]`.

    Args:
        expert, m: of each block: the expert (of all ranks), and its number among the packet's or the expert's.
        rows, height: real rows of each block, and those with padding.
        piece_block, piece_source, piece_rows: of each piece. The pieces of a packet follow each other.
        piece_start: `[num_ranks, num_experts]`, the first piece of each packet.
        row_offset: `[num_ranks, num_experts]`, where in its first block each packet begins.
        packet_height: `[num_ranks, num_experts]`, height of the packet's blocks.
    """

    expert: Array
    m: Array
    rows: Array
    height: Array
    piece_block: Array
    piece_source: Array
    piece_rows: Array
    piece_start: Array
    row_offset: Array
    packet_height: Array

    def sources(self, otherwise: Array) -> Array:
        """`[num_blocks]`: the source of each block's rows; `otherwise`, if some blocks have rows of several."""
        if len(self.piece_block) > len(self.expert):
            return otherwise
        result = np.empty_like(otherwise)
        result[self.piece_block] = self.piece_source
        return result

    def combine_pieces(self, routing: SimRouting, token_block: int) -> tuple[BlockPackets, Array]:
        """(rank, token block) beside the pieces that hold rows of its tokens: what its COMBINE waits for."""
        found = token_block_packets(routing, self.packet_height, token_block, self.row_offset)
        return found, self.piece_start[found.rank, found.expert] + found.row_block


def ladder(rows: Array, shortest: int, tallest: int) -> Array:
    """The height of each packet's tiles: the lowest that holds its rows of tallest, half of it, ... not below shortest.

    The heights of `reference.layout.tile_height`, where tallest is shortest times a power of two.
    """
    heights = np.full(rows.shape, tallest, np.int64)
    height = tallest // 2
    while height >= shortest:
        heights[rows <= height] = height
        height //= 2
    return heights


def blocks_per_source(counts: Array, heights: Array) -> Blocks:
    """Row blocks of each packet on its own; `counts` and `heights` are `[num_ranks, num_experts]`."""
    alone = blocks_per_expert(counts.reshape(1, -1), heights.ravel())  # as if each packet were an expert's only one
    source, expert = np.divmod(alone.expert, counts.shape[1])
    return replace(
        alone,
        expert=expert,
        piece_source=source,
        piece_start=alone.piece_start.reshape(counts.shape),
        row_offset=np.zeros(counts.shape, np.int64),
        packet_height=heights,
    )


def blocks_per_expert(counts: Array, heights: ArrayLike, order: Array | None = None) -> Blocks:
    """Row blocks packed over sources; `counts` is `[num_ranks, num_experts]`, `heights` `[num_experts]` or one for all.

    `order` is `[num_ranks, num_experts]`: whose packet comes first, second, ... last; else that of the ranks.
    """
    heights = np.broadcast_to(np.asarray(heights), counts.shape[1:])
    if order is not None:
        return _ordered(counts, heights, order)
    total = counts.sum(axis=0)
    number = -(-total // heights)
    expert = np.repeat(np.arange(len(total)), number)
    block_start = _exclusive(number)
    m = np.arange(len(expert)) - block_start[expert]
    rows = np.minimum(heights[expert], total[expert] - m * heights[expert])
    first = np.cumsum(counts, axis=0) - counts  # row of the expert at which each packet begins
    pieces = np.where(counts > 0, (first + counts - 1) // heights - first // heights + 1, 0)
    packet = np.repeat(np.arange(counts.size), pieces.ravel())
    start = _exclusive(pieces.ravel())
    source, of = np.divmod(packet, counts.shape[1])
    index = np.arange(len(packet)) - start[packet]
    begin, end = first.ravel()[packet], (first + counts).ravel()[packet]
    in_expert = begin // heights[of] + index
    low = np.maximum(begin, in_expert * heights[of])
    high = np.minimum(end, (in_expert + 1) * heights[of])
    tall = np.broadcast_to(heights, counts.shape)
    return Blocks(
        expert, m, rows, heights[expert], block_start[of] + in_expert, source, high - low,
        start.reshape(counts.shape), first % heights, tall,
    )  # fmt: skip


def tuned_blocks(counts: Array, tile_m: int, least_tile_m: int, order: Array | None = None) -> Blocks:
    """Packed over sources, all of one height: the lowest on the ladder that holds the mean rows of an expert with some.

    Tuners and libraries' heuristics come to that where rows are few, and all that a tile does is to read its weights.
    """
    rows = counts.sum(axis=0)
    mean = np.array([rows.sum() / max(1, np.count_nonzero(rows))])
    return blocks_per_expert(counts, ladder(mean, least_tile_m, tile_m)[0], order)


def _ordered(counts: Array, heights: Array, source: Array) -> Blocks:
    """Packed in the order of `source` `[turn, expert]`, then told by source again."""
    blocks = blocks_per_expert(np.take_along_axis(counts, source, axis=0), heights)
    turn = np.argsort(source, axis=0)  # [source, expert]
    return replace(
        blocks,
        piece_source=source[blocks.piece_source, blocks.expert[blocks.piece_block]],
        piece_start=np.take_along_axis(blocks.piece_start, turn, axis=0),
        row_offset=np.take_along_axis(blocks.row_offset, turn, axis=0),
    )


def _exclusive(values: Array) -> Array:
    result: Array = np.cumsum(values) - values
    return result


# ---- what a COMBINE waits for


class BlockPackets(NamedTuple):
    """One entry for each row block of a packet and each token block with rows in it; equal lengths, int64.

    Sorted by (rank, block, expert, row_block).
    """

    block: Array
    rank: Array
    expert: Array
    row_block: Array


def token_block_packets(
    routing: SimRouting, row_height: Array, token_block: int, row_offset: Array | None = None
) -> BlockPackets:
    """Which row blocks of their packets the tokens of each block are in: what a COMBINE of that block waits for.

    Args:
        row_height: `[num_ranks, num_experts]` integers, rows per row block of each (source, expert) packet.
        token_block: tokens per block.
        row_offset: `[num_ranks, num_experts]`, rows of others before the packet in its first row block, default none.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    _check_heights(row_height, routing)
    if token_block < 1:
        raise ValueError(f"token_block must be >= 1, got {token_block}")
    offset = np.zeros(row_height.shape, np.int64) if row_offset is None else row_offset
    slots = packet_slots(routing.topk_idx, routing.num_experts)
    parts = [
        _packets_of_rank(choices, of_rank, heights.astype(np.int64), offsets, token_block)
        for choices, of_rank, heights, offsets in zip(routing.topk_idx, slots, row_height, offset, strict=True)
    ]
    rank = np.repeat(np.arange(routing.num_ranks), [len(block) for block, _, _ in parts])
    block, expert, row_block = (np.concatenate(column) for column in zip(*parts, strict=True))
    return BlockPackets(block, rank, expert, row_block)


def _packets_of_rank(
    choices: Array, slots: Array, heights: Array, offsets: Array, token_block: int
) -> tuple[Array, Array, Array]:
    """The distinct (block, expert, row block) of one source, sorted."""
    token, _ = sent = np.nonzero(choices >= 0)
    expert = choices[sent]
    row_block = (slots[sent] + offsets[expert]) // heights[expert]
    num_row_blocks = int(row_block.max(initial=0)) + 1
    key = np.unique((token // token_block * len(heights) + expert) * num_row_blocks + row_block)
    packet, row_block = np.divmod(key, num_row_blocks)
    block, expert = np.divmod(packet, len(heights))
    return block, expert, row_block


def _check_heights(row_height: Array, routing: SimRouting) -> None:
    check_array("row_height", row_height, (routing.num_ranks, routing.num_experts))
    if row_height.dtype.kind not in "iu":
        raise TypeError(f"row_height must have an integer dtype, got {row_height.dtype}")
    if row_height.size and row_height.min() < 1:
        raise ValueError(f"row_height must be >= 1, got {row_height.min()}")
