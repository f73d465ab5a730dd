"""GEMM0 and GEMM1 of a backward: gradients of hidden rows by the down matrices, and rows of dx by the up matrices.

GEMM0 needs the products with the up matrices. They were kept, or are made again of rows that were kept, or sent again.
"""

from __future__ import annotations

from flashmoe_numba.device import block_sync, jit, lane, lanes, load
from flashmoe_numba.tile_gemm import Rows, hidden_gradient, tile_gemm
from reference.task_kinds import GEMM1

from ..gemms import finish_tile, finished_last, queue_down
from ..in_order import nothing_kept
from ..peers import put_dot, result_rooms
from ..queue import QueueTask
from ..row_tiles import copy_rows, hidden_rooms, kept_rooms, kept_rows, read_tile, row_of, rows_in
from ..sizes import down_tiles, up_tiles
from ..state import IS_LAST
from ..weights import need_weights


@jit
def gemm0(p, segments, experts, received, back, queue, scratch, box, task):
    """One column tile; the last one of a row tile sends the gradients of its rows' factors home."""
    packet = task.peer * p.experts_per_rank + task.expert
    index = packet * p.row_blocks + task.m
    tile = read_tile(received, index)
    dy = rows_in(p, segments, received, packet, tile)
    kept = kept_rows(received, packet, tile, received.kept_ups)
    if p.recomputes:
        make_ups(p, segments, experts, received, back, scratch, task, packet, tile, dy)
    if task.n == 0:
        keep_packet_rows(p, segments, received, back, packet, tile, dy)
    hidden_gradient(
        kept, back.up_gradients, back.active, back.dots, segments.factors, p.parts, dy, tile.rows,
        back.down, task.expert, task.n, experts.form, scratch,
    )  # fmt: skip
    block_sync()
    if lane() == 0:
        box[IS_LAST] = finished_last(received.up_done, index, up_tiles(p))
    block_sync()
    if box[IS_LAST]:
        send_dots(p, segments, received, back, packet, tile, dy, kept)
        block_sync()
        if lane() == 0:
            queue_down(p, queue, QueueTask(GEMM1, task.peer, task.expert, task.m, 0))
            if p.weight_tasks > 0:
                need_weights(p, received, queue, task.expert, -tile.rows)


@jit
def make_ups(p, segments, experts, received, back, scratch, task, packet, tile, dy):
    """This tile's products with the up matrices, as the forward made them, and its hidden rows, which nobody needs."""
    rows = kept_rows(received, packet, tile, received.kept_rows)
    if p.resends:
        rows = Rows(segments.again, dy.first, dy.places, dy.at)
    tile_gemm(
        hidden_rooms(received, tile), kept_rooms(received, packet, tile), rows, tile.rows,
        back.up_again, task.expert, task.n, experts.form, scratch,
    )  # fmt: skip
    block_sync()


@jit
def keep_packet_rows(p, segments, received, back, packet, tile, dy):
    """What the gradients of weights need of packets, which may be overwritten once all results are home."""
    if p.weight_tasks > 0:
        kept = kept_rows(received, packet, tile, back.dy_rows)
        copy_rows(kept, dy, tile.rows, p.hidden)
        for r in range(lane(), tile.rows, lanes()):
            back.factors[row_of(kept, r)] = segments.factors[row_of(dy, r)]
        if p.resends:
            again = Rows(segments.again, dy.first, dy.places, dy.at)
            copy_rows(kept_rows(received, packet, tile, received.kept_rows), again, tile.rows, p.hidden)


@jit
def send_dots(p, segments, received, back, packet, tile, dy, kept):
    """The gradient of each row's factor: dy times the row's result, by way of the hidden row, so without the result."""
    for r in range(lane(), tile.rows, lanes()):
        at = row_of(kept, r) * up_tiles(p)
        total = back.dots[at]
        for n in range(1, up_tiles(p)):
            total += back.dots[at + n]
        if back.down_bias.size > 0:
            bias_at, row_at = packet % p.experts_per_rank * p.hidden, row_of(dy, r) * p.hidden
            for c in range(p.hidden):
                total += load(segments.dispatch, row_at + c) * back.down_bias[bias_at + c]
        put_dot(p, segments, received, packet, tile, r, total)


@jit
def gemm1(p, segments, experts, received, back, scratch, task):
    """One column tile of rows of dx, stored into the sources' memory; the last one of a row tile signals."""
    packet = task.peer * p.experts_per_rank + task.expert
    index = packet * p.row_blocks + task.m
    tile = read_tile(received, index)
    rooms = result_rooms(p, segments, received, packet, tile)
    tile_gemm(
        rooms, nothing_kept(rooms), kept_rows(received, packet, tile, back.up_gradients), tile.rows,
        back.up, task.expert, task.n, experts.linear, scratch,
    )  # fmt: skip
    block_sync()
    if lane() == 0 and finished_last(received.down_done, index, down_tiles(p)):
        finish_tile(p, segments, received, task.expert, tile)
