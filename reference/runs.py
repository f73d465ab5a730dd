"""Row tiles, which rows are multiplied together; and result chunks, which rows come back under one flag.

A row tile holds runs: rows that follow each other in one packet. Its tasks compute all of them, whoever sent them. A
result flag stands for a fixed chunk of a packet's slots, which its source and its owner know from the packet's size
alone, whatever the tiles are. So where tiles are cut is free: results do not depend on it. `row_tiles` cuts each packet
on its own and at its chunks, so a tile has one run, which is one chunk; the kernel cuts what has come (packing by
sources), and `tiling_problem` says what must hold there. Leaves out: columns, tasks, time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .config import MoEConfig
from .layout import num_row_blocks, tile_height
from .packets import Packets

PACKINGS = ("sources", "none")  # whose rows a row tile may hold


class RowRun(NamedTuple):
    """Rows `first` to `first + num_rows` of the packet that `source` sent to the tile's expert."""

    source: int
    first: int
    num_rows: int

    @property
    def slots(self) -> range:
        return range(self.first, self.first + self.num_rows)


@dataclass(frozen=True)
class RowTile:
    """Rows that one expert multiplies together.

    Args:
        peer, m: its name in tasks: the source of its first run, and the number of earlier tiles that begin with its.
        height: rows with padding: the lowest height that holds them.
        runs: its rows in their order, each run of another packet.
    """

    peer: int
    m: int
    height: int
    runs: tuple[RowRun, ...]

    @property
    def num_rows(self) -> int:
        return sum(run.num_rows for run in self.runs)


def packet_tile_height(num_rows: int, config: MoEConfig) -> int:
    return tile_height(num_rows, config.tile_m_min, config.tile_m)


def packet_row_blocks(num_rows: int, config: MoEConfig) -> int:
    return num_row_blocks(num_rows, config.tile_m_min, config.tile_m)


def tiling_problem(tiles: Sequence[RowTile], rows: Sequence[int], config: MoEConfig) -> str | None:
    """What is wrong with the tiles of one expert, to which the sources sent that many rows each, or None.

    Every row is in one tile, the rows of a packet are in the order of their tiles, and a tile that begins in a packet
    is named by the number of earlier ones that do.
    """
    for tile in tiles:
        if not 1 <= tile.num_rows <= config.tile_m or tile.height != packet_tile_height(tile.num_rows, config):
            return f"{tile} must have 1 to tile_m={config.tile_m} rows, and the lowest height for them"
        if tile.peer != tile.runs[0].source or len({run.source for run in tile.runs}) < len(tile.runs):
            return f"{tile} must be named by its first run, and have one run of a packet"
        if any(run.num_rows < 1 for run in tile.runs):
            return f"{tile} must have runs of one row or more"
    for source, num_rows in enumerate(rows):
        runs = sorted((run.first, run.num_rows) for tile in tiles for run in tile.runs if run.source == source)
        slots = [slot for first, count in runs for slot in range(first, first + count)]
        if slots != list(range(num_rows)):
            return f"the {num_rows} rows of source {source} must be in one tile each, got slots {slots}"
        begun = sorted((tile.runs[0].first, tile.m) for tile in tiles if tile.peer == source)
        if len(begun) > packet_row_blocks(num_rows, config):
            return f"at most {packet_row_blocks(num_rows, config)} tiles may begin in the packet of source {source}"
        if [m for _, m in begun] != list(range(len(begun))):
            return f"tiles that begin in the packet of source {source} must be numbered in order, got {begun}"
    return None


def row_tiles(rows: Sequence[int], config: MoEConfig) -> list[RowTile]:
    """The tiles of one expert, to which the sources sent that many rows each."""
    tiles = []
    for source, num_rows in enumerate(rows):
        height = packet_tile_height(num_rows, config)
        for m, first in enumerate(range(0, num_rows, height)):
            run = RowRun(source, first, min(height, num_rows - first))
            tiles.append(RowTile(source, m, packet_tile_height(run.num_rows, config), (run,)))
    return tiles


def expert_tiles(packets: Sequence[Packets], config: MoEConfig) -> list[list[RowTile]]:
    """The tiles of each expert of the layer; `packets` are those of each source rank."""
    rows = zip(*(packet.sent.tolist() for packet in packets), strict=True)
    return [row_tiles(of_expert, config) for of_expert in rows]


def chunk_height(num_rows: int, config: MoEConfig) -> int:
    """Slots in each result chunk of a packet of `num_rows` rows, but for the last."""
    return packet_tile_height(num_rows, config)


def result_chunks(num_rows: int, config: MoEConfig) -> list[range]:
    """The slots of a packet of `num_rows` rows for which each of its result flags stands."""
    height = chunk_height(num_rows, config)
    return [range(first, min(first + height, num_rows)) for first in range(0, num_rows, height)]
