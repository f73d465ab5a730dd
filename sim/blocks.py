"""Row blocks: which rows share a tile. Per source, as FlashMoE has it, or packed over all sources of an expert.

The rows of one (source, expert) packet follow each other. Per source, a packet begins a row block of its own; packed,
the packets of an expert are laid end to end, in the order of their sources, and cut into blocks of one height. The part
of a packet in one block is a piece: what must arrive for the block, and what goes back to that source from it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .graph import Array
from .routing import BlockPackets, SimRouting, token_block_packets


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
    """The tile height of each packet: the first of shortest, twice that, ... tallest that holds its rows."""
    heights = np.full(rows.shape, tallest, np.int64)
    height = tallest // 2
    while height >= shortest:
        heights[rows <= height] = height
        height //= 2
    return heights


def blocks_per_source(counts: Array, heights: Array) -> Blocks:
    """Row blocks of each packet on its own; `counts` and `heights` are `[num_ranks, num_experts]`."""
    number = -(-counts // heights)
    packet = np.repeat(np.arange(counts.size), number.ravel())
    start = _exclusive(number.ravel())
    m = np.arange(len(packet)) - start[packet]
    height = heights.ravel()[packet]
    rows = np.minimum(height, counts.ravel()[packet] - m * height)
    block = np.arange(len(packet))
    source, expert = np.divmod(packet, counts.shape[1])
    zero = np.zeros(counts.shape, np.int64)
    return Blocks(expert, m, rows, height, block, source, rows, start.reshape(counts.shape), zero, heights)


def blocks_per_expert(counts: Array, heights: Array, order: Array | None = None) -> Blocks:
    """Row blocks packed over sources; `counts` is `[num_ranks, num_experts]` and `heights` `[num_experts]`.

    `order` is `[num_ranks, num_experts]`: whose packet comes first, second, ... last; else that of the ranks.
    """
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
