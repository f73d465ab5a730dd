"""GEMM0 and GEMM1: one tile of an expert's matrix products for the rows of one packet."""

from __future__ import annotations

from flashmoe_numba.device import block_sync, fetch_add, jit, lane
from flashmoe_numba.tile_gemm import IDENTITY, tile_gemm
from reference.task_kinds import GEMM1

from .peers import result_room, tell_results
from .queue import QueueTask, fill, reserve
from .sizes import down_tiles, tile_height, up_tiles


@jit
def gemm0(p, segments, experts, received, queue, scratch, task):
    """One column tile of the up projections; the last one of a row tile lets the down projection begin."""
    source, expert, m = task.peer, task.expert, task.m
    packet = source * p.experts_per_rank + expert
    first, rows = packet_tile(p, received, packet, m)
    tile_gemm(
        received.hidden, received.first_row[packet] + first,
        segments.dispatch, packet * p.slots + first, rows, experts.up, expert, task.n, p.activation, scratch,
    )  # fmt: skip
    block_sync()
    if lane() == 0 and finished_last(received.up_done, packet * p.row_blocks + m, up_tiles(p)):
        place = reserve(p, queue, down_tiles(p))
        for n in range(down_tiles(p)):
            fill(p, queue, place + n, QueueTask(GEMM1, source, expert, m, n))


@jit
def gemm1(p, segments, experts, received, scratch, task):
    """One column tile of the down projection, stored into the source's memory; the last one of a row tile signals."""
    source, expert, m = task.peer, task.expert, task.m
    packet = source * p.experts_per_rank + expert
    first, rows = packet_tile(p, received, packet, m)
    e = p.rank_idx * p.experts_per_rank + expert
    tile_gemm(
        result_room(p, segments, source), e * p.slots + first,
        received.hidden, received.first_row[packet] + first, rows, experts.down, expert, task.n, IDENTITY, scratch,
    )  # fmt: skip
    block_sync()
    if lane() == 0 and finished_last(received.down_done, packet * p.row_blocks + m, down_tiles(p)):
        tell_results(p, segments, source, e, m, rows)


@jit
def packet_tile(p, received, packet, m):
    """(first row, number of rows) of row tile m."""
    height = tile_height(received.rows[packet], p.tile_m_min, p.tile_m)
    return m * height, min(height, received.rows[packet] - m * height)


@jit
def finished_last(done, i, num_tiles):
    """Count one finished tile; True for the last, which leaves the counter at zero for the next call."""
    if fetch_add(done, i, 1) + 1 < num_tiles:
        return False
    done[i] = 0
    return True
