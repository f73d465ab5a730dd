"""The row tiles of a rank's last call: what the kernel cut (kernel/row_tiles.py), in the reference's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from reference import MoEConfig
from reference.runs import RowRun, RowTile, packet_tile_height

from ..kernel.row_tiles import TILE_WORDS, CutTile
from ..kernel.state import Received


def read_tiles(
    received: Received, epoch: int, config: MoEConfig, to_host: Callable[[Any], np.ndarray]
) -> list[list[RowTile]]:
    """The tiles of each of the rank's experts, ordered by their names.

    Args:
        epoch: of the call; packets that it has not seen have none.
    """
    per_packet = config.num_ranks, config.num_experts_per_rank
    seen, rows, begun = (to_host(array).reshape(per_packet) for array in (received.seen, received.rows, received.begun))
    arrived = to_host(received.arrived).reshape(config.num_experts_per_rank, config.num_ranks)
    tiles = to_host(received.tiles).reshape(*per_packet, -1, TILE_WORDS)
    return [
        [
            _tile(CutTile._make(tiles[source, expert, m].tolist()), source, m, arrived[expert], rows[:, expert], config)
            for source in range(config.num_ranks)
            if seen[source, expert] == epoch
            for m in range(begun[source, expert])
        ]
        for expert in range(config.num_experts_per_rank)
    ]


def _tile(tile: CutTile, source: int, m: int, arrived: np.ndarray, rows: np.ndarray, config: MoEConfig) -> RowTile:
    runs, left, first = [], tile.rows, tile.slot
    for peer in arrived[tile.arrival :].tolist():
        if left > 0:
            runs.append(RowRun(peer, first, min(left, int(rows[peer]) - first)))
            left, first = left - runs[-1].num_rows, 0
    return RowTile(source, m, packet_tile_height(tile.rows, config), tuple(runs))
