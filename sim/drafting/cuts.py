"""Row blocks cut off streams: the rows of an expert as its packets arrive, cut wherever somebody says.

The packets of an expert follow each other in the order in which they arrived, and row blocks are cut off the front. So
a packet's rows may be in any of its expert's blocks, and where a block begins in a packet says `piece_slot`. What goes
back to a source is counted in *chunks*, row blocks of its packet alone, whatever the blocks are.

Source: packing by sources in flashmoe_numba/kernel/row_tiles.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from ..engine.graph import NONE, Array
from .blocks import Blocks


class Cut(NamedTuple):
    """The next rows of an expert's stream become a block.

    `held_ns` is how long they had waited since the last packet among them arrived; NONE if that packet cut them.
    """

    expert: int
    rows: int
    held_ns: int = NONE


@dataclass(frozen=True, eq=False)
class CutBlocks(Blocks):
    """Row blocks in the order of their experts' streams. They have no one height, so `combine_pieces` refuses them.

    They are named as the kernel names them: by the packet in which they begin, and `m` earlier ones began there, too.

    Args:
        piece_slot: `[num_pieces]`, the row of its packet with which each piece begins.
        first_source, last_source: `[num_blocks]`, whose packets are the first and the last of each block to arrive.
        held_ns: `[num_blocks]`, as in `Cut`.
    """

    piece_slot: Array
    first_source: Array
    last_source: Array
    held_ns: Array

    def equals(self, other: CutBlocks) -> bool:
        return all(np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))


def cut_blocks(counts: Array, order: Array, cuts: Sequence[Cut], height: Array) -> CutBlocks:
    """The blocks of these cuts, which hold all rows.

    Args:
        counts: `[num_ranks, num_experts]`, rows of each packet.
        order: `[num_ranks, num_experts]`, turn and expert: whose packet arrived first, second, ... last.
        cuts: those of an expert in the order of its stream.
        height: with padding, of each number of rows that a block may have.
    """
    expert, rows, held_ns = (
        np.array(cuts, np.int64).reshape(-1, 3)[np.argsort([c.expert for c in cuts], kind="stable")].T
    )
    start = np.cumsum(rows) - rows  # of each block, all experts' streams laid end to end
    of, turn = np.nonzero(np.take_along_axis(counts, order, axis=0).T)
    source = order[turn, of]
    packet_rows = counts[source, of]
    packet_start = np.cumsum(packet_rows) - packet_rows
    bounds = np.union1d(start, packet_start)
    block, packet = (np.searchsorted(first, bounds, side="right") - 1 for first in (start, packet_start))
    ends = start, start + rows - 1
    first_packet, last_packet = (packet[np.searchsorted(bounds, row, side="right") - 1] for row in ends)
    by_packet = np.lexsort((bounds, of[packet], source[packet]))
    pieces = np.bincount(source[packet] * counts.shape[1] + of[packet], minlength=counts.size)
    return CutBlocks(
        expert=expert,
        m=np.arange(len(expert)) - np.searchsorted(first_packet, first_packet),
        rows=rows,
        height=height[rows],
        piece_block=block[by_packet],
        piece_source=source[packet][by_packet],
        piece_rows=np.diff(np.append(bounds, rows.sum()))[by_packet],
        piece_start=(np.cumsum(pieces) - pieces).reshape(counts.shape),
        row_offset=np.zeros(counts.shape, np.int64),
        packet_height=np.zeros(counts.shape, np.int64),
        piece_slot=(bounds - packet_start[packet])[by_packet],
        first_source=source[first_packet],
        last_source=source[last_packet],
        held_ns=held_ns,
    )


def as_if_at_once(counts: Array, tile_m: int) -> list[Cut]:
    """The cuts of streams of which everything is here."""
    total: list[int] = counts.sum(axis=0).tolist()
    return [
        Cut(expert, min(tile_m, rows - first)) for expert, rows in enumerate(total) for first in range(0, rows, tile_m)
    ]


def chunk_pieces(blocks: CutBlocks, chunks: Blocks) -> tuple[Array, Array]:
    """(piece, chunk): which pieces of `blocks` hold rows of which pieces of `chunks`, which are cut per source."""
    source, expert = blocks.piece_source, blocks.expert[blocks.piece_block]
    height = chunks.packet_height[source, expert]
    first = blocks.piece_slot // height
    number = (blocks.piece_slot + blocks.piece_rows - 1) // height - first + 1
    piece = np.repeat(np.arange(len(number)), number)
    index = np.arange(len(piece)) - (np.cumsum(number) - number)[piece]
    return piece, (chunks.piece_start[source, expert] + first)[piece] + index
