"""A processor block: draw a ticket, wait for its task, run it, tell who depends on it; until the rank has no more."""

from __future__ import annotations

from flashmoe_numba.device import (
    block_sync,
    fetch_add,
    jit,
    lane,
    ld_acquire,
    now,
)
from flashmoe_numba.tile_gemm import IDENTITY, tile_gemm
from reference.tiles import COMBINE, DISPATCH, GATE, GEMM0, GEMM1

from .combine import combine
from .control import PROCESSOR, TASK_FLAG, AbortRecord
from .dispatch import dispatch
from .gate import gate
from .peers import result_room, tell_results
from .queue import EXPERT, HEAD, KIND, PEER, STAMP, TASK_WORDS, TOTAL, M, N, counter, fill, reserve
from .sizes import down_tiles, tile_height, up_tiles
from .state import PLACE
from .trace import note_event
from .waits import (
    aborted,
    begin_wait,
    give_up,
    keep_waiting,
    note_progress,
    silence_ns,
)


@jit
def processor(p, block, segments, experts, tokens, packets, queue, scratch, box, trace):
    while True:
        place = next_task(p, block, segments, queue, box)
        if place < 0:
            break
        start = now()
        at = place * TASK_WORDS
        kind, peer, expert = queue.tasks[at + KIND], queue.tasks[at + PEER], queue.tasks[at + EXPERT]
        m, n = queue.tasks[at + M], queue.tasks[at + N]
        if kind == GATE:
            gate(p, tokens, experts, queue, scratch, box, m)
        elif kind == DISPATCH:
            dispatch(p, tokens, segments, peer, expert)
        elif kind == GEMM0:
            gemm0(p, segments, experts, packets, queue, scratch, peer, expert, m, n)
        elif kind == GEMM1:
            gemm1(p, segments, experts, packets, scratch, peer, expert, m, n)
        elif kind == COMBINE:
            combine(p, tokens, segments, scratch, m)
        if lane() == 0:
            note_event(trace, kind, peer, expert, m, n, start)
            note_progress(segments)


@jit
def next_task(p, block, segments, queue, box):
    """Place of the next task, the same for all lanes; -1 when there is none left or the call was aborted."""
    block_sync()
    if lane() == 0:
        box[PLACE] = wait_for_place(p, block, segments, queue)
    block_sync()
    return box[PLACE]


@jit
def wait_for_place(p, block, segments, queue):
    place = fetch_add(queue.counters, counter(p, HEAD), 1)
    stamp_at = place * TASK_WORDS + STAMP
    num_places = queue.tasks.size // TASK_WORDS
    wait = begin_wait()
    while place >= num_places or ld_acquire(queue.tasks, stamp_at) != p.epoch:
        total = ld_acquire(queue.counters, counter(p, TOTAL))  # 0 while unknown, else 1 + the number of tasks
        if total > 0 and place >= total - 1:
            return -1
        if aborted(segments):
            return -1
        wait = keep_waiting(p, segments, wait)
        if silence_ns(wait) > p.deadline_ns + p.deadline_ns // 2:  # the OS block knows more, so it should speak first
            record = AbortRecord(block, PROCESSOR, TASK_FLAG, p.rank_idx, 0, place, p.epoch, total, 1, p.deadline_ns)
            give_up(p, segments, record)
            return -1
    return -1 if aborted(segments) else place  # nobody wants the rest of the queue any more


@jit
def packet_tile(p, packets, packet, m):
    """(first row, number of rows) of row tile m."""
    height = tile_height(packets.rows[packet], p.tile_m_min, p.tile_m)
    return m * height, min(height, packets.rows[packet] - m * height)


@jit
def gemm0(p, segments, experts, packets, queue, scratch, source, expert, m, n):
    """One column tile of the up projections; the last one of a row tile lets the down projection begin."""
    packet = source * p.experts_per_rank + expert
    first, rows = packet_tile(p, packets, packet, m)
    tile_gemm(
        packets.hidden, packets.first_row[packet] + first,
        segments.dispatch, packet * p.slots + first, rows, experts.up, expert, n, p.activation, scratch,
    )  # fmt: skip
    block_sync()
    if lane() == 0 and finished_last(packets.up_done, packet * p.row_blocks + m, up_tiles(p)):
        place = reserve(p, queue, down_tiles(p))
        for down_n in range(down_tiles(p)):
            fill(p, queue, place + down_n, GEMM1, source, expert, m, down_n)


@jit
def gemm1(p, segments, experts, packets, scratch, source, expert, m, n):
    """One column tile of the down projection, stored into the source's memory; the last one of a row tile signals."""
    packet = source * p.experts_per_rank + expert
    first, rows = packet_tile(p, packets, packet, m)
    e = p.rank_idx * p.experts_per_rank + expert
    tile_gemm(
        result_room(p, segments, source), e * p.slots + first,
        packets.hidden, packets.first_row[packet] + first, rows, experts.down, expert, n, IDENTITY, scratch,
    )  # fmt: skip
    block_sync()
    if lane() == 0 and finished_last(packets.down_done, packet * p.row_blocks + m, down_tiles(p)):
        tell_results(p, segments, source, e, m, rows)


@jit
def finished_last(done, i, num_tiles):
    """Count one finished tile; True for the last, which leaves the counter at zero for the next call."""
    if fetch_add(done, i, 1) + 1 < num_tiles:
        return False
    done[i] = 0
    return True
