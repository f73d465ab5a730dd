"""GEMM0 and GEMM1: one tile of an expert's matrix products for the rows of one row tile (row_tiles.py)."""

from __future__ import annotations

from flashmoe_numba.device import block_sync, fetch_add, jit, lane
from flashmoe_numba.tile_gemm import tile_gemm
from reference.task_kinds import GEMM1

from .in_order import nothing_kept
from .peers import result_rooms, tell_results
from .queue import QueueTask, fill, reserve
from .row_tiles import (
    copy_rows,
    hidden_rooms,
    hidden_rows,
    kept_rooms,
    kept_rows,
    next_run,
    read_tile,
    rows_in,
    without_run,
)
from .sizes import down_tiles, tile_height, up_tiles


@jit
def gemm0(p, segments, experts, received, queue, scratch, task):
    """One column tile of the up projections; the last one of a row tile lets the down projection begin."""
    packet = task.peer * p.experts_per_rank + task.expert
    index = packet * p.row_blocks + task.m
    tile = read_tile(received, index)
    a = rows_in(p, segments, received, packet, tile)
    tile_gemm(
        hidden_rooms(received, tile), kept_rooms(received, packet, tile), a, tile.rows,
        experts.up, task.expert, task.n, experts.form, scratch,
    )  # fmt: skip
    if p.keeps and task.n == 0 and received.kept_rows.size > 0:
        copy_rows(kept_rows(received, packet, tile, received.kept_rows), a, tile.rows, p.hidden)
    block_sync()
    if lane() == 0 and finished_last(received.up_done, index, up_tiles(p)):
        queue_down(p, queue, QueueTask(GEMM1, task.peer, task.expert, task.m, 0))


@jit
def queue_down(p, queue, task):
    """Let a row tile's second product begin: a task like this one for each of its column tiles."""
    place = reserve(p, queue, down_tiles(p))
    for n in range(down_tiles(p)):
        fill(p, queue, place + n, QueueTask(task.kind, task.peer, task.expert, task.m, n))


@jit
def gemm1(p, segments, experts, received, scratch, task):
    """One column tile of the down projection, stored into the sources' memory; the last one of a row tile signals."""
    packet = task.peer * p.experts_per_rank + task.expert
    index = packet * p.row_blocks + task.m
    tile = read_tile(received, index)
    out = result_rooms(p, segments, received, packet, tile)
    tile_gemm(
        out, nothing_kept(out), hidden_rows(received, tile), tile.rows,
        experts.down, task.expert, task.n, experts.linear, scratch,
    )  # fmt: skip
    block_sync()
    if lane() == 0 and finished_last(received.down_done, index, down_tiles(p)):
        finish_tile(p, segments, received, task.expert, tile)


@jit
def finished_last(done, i, num_tiles):
    """Count one finished tile; True for the last, which leaves the counter at zero for the next call."""
    if fetch_add(done, i, 1) + 1 < num_tiles:
        return False
    done[i] = 0
    return True


@jit
def finish_tile(p, segments, received, expert, tile):
    """All results of a tile are stored: of each run of its rows, count them in the result chunks that they are in."""
    while tile.rows > 0:
        source, _, rows = next_run(p, received, expert, tile)
        count_run(p, segments, received, source, expert, tile.slot, tile.slot + rows)
        tile = without_run(tile, rows)


@jit
def count_run(p, segments, received, source, expert, first, end):
    """Tell the source of every chunk that these slots of its packet complete."""
    packet = source * p.experts_per_rank + expert
    height = tile_height(received.rows[packet], p.tile_m_min, p.tile_m)
    for m in range(first // height, (end - 1) // height + 1):
        chunk = min(height, received.rows[packet] - m * height)
        rows = min(end, (m + 1) * height) - max(first, m * height)
        if finished_rows(received.chunk_done, packet * p.row_blocks + m, rows, chunk):
            tell_results(p, segments, source, expert, m, m * height, chunk)


@jit
def finished_rows(done, i, rows, all_rows):
    """The same for a number of rows."""
    if fetch_add(done, i, rows) + rows < all_rows:
        return False
    done[i] = 0
    return True
