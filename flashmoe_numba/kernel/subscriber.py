"""The OS block: starts a call, polls signals, and turns each into tasks.

A lane polls the flags of every `lanes()`-th expert, and lanes meet only at atomic counters. The rows of packets become
row tiles (row_tiles.py), and these GEMM0 tasks: a full tile at once; rows that do not fill one when the expert's last
packet is here, or when processors run idle. The result of a chunk counts down the token blocks whose rows it holds, and
a token block at zero becomes a COMBINE task. When the last packet has been seen the number of this rank's tasks is
known, and published for the processors to stop by.
"""

from __future__ import annotations

from flashmoe_numba.device import fetch_add, has_settled, jit, lane, lanes, ld_acquire, ld_relaxed, now, st_release
from reference.task_kinds import GATE, GEMM0, RECEIVE

from .combine import need
from .control import DISPATCH_FLAG, GATE_FLAG, OTHER_CALL, RESULT_FLAG, SUBSCRIBER, AbortRecord
from .peers import acquire_flag
from .queue import (
    GATE_OPEN,
    GEMM_TASKS,
    KEPT_ROWS,
    PACKETS_SEEN,
    TOTAL,
    QueueTask,
    counter,
    fill,
    is_idle,
    reserve,
    zero_next_counters,
)
from .row_tiles import (
    append_packet,
    begin_stream,
    cut_tile,
    cut_tiles,
    packets_missing,
    rows_waiting,
    take_tiles,
    tile_name,
)
from .shared import queue_early_shared
from .signals import last_packet_flag, packet_flag, word_call, word_epoch, word_rows
from .sizes import (
    down_tiles,
    num_gate_tasks,
    num_row_blocks,
    num_shared_tasks,
    num_token_blocks,
    tile_height,
    up_tiles,
)
from .trace import note_event
from .waits import aborted, begin_wait, give_up, keep_waiting, note_silence, silence_ns, waits_itself
from .weights import need_weights


@jit
def os_block(block, rank, trace):
    p, queue = rank.problem, rank.queue
    if lane() == 0:
        zero_next_counters(p, queue)
        first = reserve(p, queue, num_gate_tasks(p))
        for b in range(num_gate_tasks(p)):
            fill(p, queue, first + b, QueueTask(GATE, 0, 0, b, 0))
        queue_early_shared(p, queue)
    subscribe(block, rank, trace)


@jit
def subscribe(block, rank, trace):
    """Poll this lane's flags until all have been seen."""
    p, segments, tokens, queue = rank.problem, rank.segments, rank.tokens, rank.queue
    for expert in range(lane(), p.experts_per_rank, lanes()):
        begin_stream(rank.received, expert)
    packets_left = (p.experts_per_rank - lane() + lanes() - 1) // lanes() * p.num_ranks
    results_left = -1  # unknown until the gate is open
    wait = begin_wait()
    while packets_left > 0 or results_left != 0:
        seen = 0
        if results_left < 0 and ld_acquire(queue.counters, counter(p, GATE_OPEN)) != 0:
            results_left = count_results(p, tokens)
            seen += 1
        if results_left >= 0:  # not before: this rank's dispatches, which its peers wait for, come first in the queue
            arrived = poll_packets(p, segments, rank.received, queue, block, trace)
            landed = poll_results(p, segments, tokens, queue)
            packets_left -= arrived
            results_left -= landed
            seen += arrived + landed
        if seen == 0 and has_settled(wait.attempt):
            seen = cut_rests(p, segments, rank.received, queue)
        if seen > 0:
            wait = begin_wait()
        else:
            if aborted(segments):
                return
            wait = keep_waiting(p, segments, wait)
            note_silence(p, segments, wait)
            if silence_ns(wait) > p.deadline_ns:
                blame(block, rank, packets_left, results_left)
                return


@jit
def poll_packets(p, segments, received, queue, block, trace):
    """Admit what has arrived for this lane's experts since the last look; returns how many packets."""
    seen = 0
    for expert in range(lane(), p.experts_per_rank, lanes()):
        before = seen
        for source in range(p.num_ranks):
            packet = source * p.experts_per_rank + expert
            if received.seen[packet] != p.epoch and has_come(p, segments, packet):
                start = now()
                if not open_packet(p, segments, received, queue, expert, source):
                    refuse_packet(block, p, segments, expert, source)
                    return seen
                least = p.tile_m if is_held_back(p, received, expert) else 1
                cut_tiles(p, segments, received, queue, expert, least)
                note_event(trace, QueueTask(RECEIVE, source, expert, 0, received.rows[packet]), start)
                seen += 1
        if seen > before:
            queue_tiles(p, received, queue, expert)
            if p.weight_tasks > 0 and packets_missing(p, received, expert) == 0:
                expect_weights(p, received, queue, expert)
    if seen > 0 and fetch_add(queue.counters, counter(p, PACKETS_SEEN), seen) + seen == p.num_experts:
        gemms = ld_acquire(queue.counters, counter(p, GEMM_TASKS))
        total = num_gate_tasks(p) + p.num_experts + num_token_blocks(p) + gemms + num_shared_tasks(p)
        total += p.router_weight_tasks + p.shared_weight_tasks + p.norm_weight_tasks
        st_release(queue.counters, counter(p, TOTAL), total + 1)
    return seen


@jit
def has_come(p, segments, packet):
    """Is this call's packet here?"""
    return word_epoch(ld_relaxed(segments.dispatch_flag, packet_flag(p, packet))) == p.epoch


@jit
def open_packet(p, segments, received, queue, expert, source):
    """Take note of a packet that is here: its rows join the expert's stream. False: it is of another call than ours."""
    packet = source * p.experts_per_rank + expert
    word = acquire_flag(segments, source, segments.dispatch_flag, packet_flag(p, packet))
    if word_call(word) != p.call:
        return False
    rows = word_rows(word)
    received.seen[packet] = p.epoch
    if p.keeps:
        received.first[packet] = fetch_add(queue.counters, counter(p, KEPT_ROWS), rows)
    append_packet(p, received, expert, source, rows)
    return True


@jit
def refuse_packet(block, p, segments, expert, source):
    """Ranks make different calls: that ends them all."""
    found = ld_relaxed(segments.dispatch_flag, packet_flag(p, source * p.experts_per_rank + expert))
    give_up(
        p, segments,
        AbortRecord(block, SUBSCRIBER, OTHER_CALL, source, expert, p.call, p.epoch, found, 1, p.deadline_ns),
    )  # fmt: skip


@jit
def expect_weights(p, received, queue, expert):
    """All packets of an expert are here: the gradient of its weights needs all their rows."""
    rows = 0
    for source in range(p.num_ranks):
        rows += received.rows[source * p.experts_per_rank + expert]
    if rows > 0:
        fetch_add(queue.counters, counter(p, GEMM_TASKS), p.weight_tasks)
        need_weights(p, received, queue, expert, rows)


@jit
def is_held_back(p, received, expert):
    """May rows that do not fill a tile wait for others? Nobody waits for what will not come."""
    return p.packed and packets_missing(p, received, expert) > 0


@jit
def cut_rests(p, segments, received, queue):
    """Processors run idle, and nothing comes: multiply what waits; returns how many tiles that were."""
    cut = 0
    for expert in range(lane(), p.experts_per_rank, lanes()):
        rows = rows_waiting(received, expert)  # fewer than a tile has
        if rows > 0 and is_idle(p, queue):
            cut_tile(p, segments, received, queue, expert, rows)
            cut += queue_tiles(p, received, queue, expert)
    return cut


@jit
def queue_tiles(p, received, queue, expert):
    """Queue the GEMM0 tasks of an expert's new tiles, all tiles of a column tile in a row: they share weights.

    Returns how many tiles these are.
    """
    first, end = take_tiles(received, expert)
    if first == end:
        return 0
    fetch_add(queue.counters, counter(p, GEMM_TASKS), (end - first) * (up_tiles(p) + down_tiles(p)))
    place = reserve(p, queue, (end - first) * up_tiles(p))
    for n in range(up_tiles(p)):
        for i in range(first, end):
            packet, m = tile_name(p, received, expert, i)
            fill(p, queue, place, QueueTask(GEMM0, packet // p.experts_per_rank, expert, m, n))
            place += 1
    return end - first


@jit
def count_results(p, tokens):
    """Result chunks that this lane waits for."""
    chunks = 0
    for e in range(lane(), p.num_experts, lanes()):
        chunks += tokens.results_left[e]
    return chunks


@jit
def poll_results(p, segments, tokens, queue):
    """Land this lane's result chunks that have arrived since the last look; returns how many."""
    landed = 0
    for e in range(lane(), p.num_experts, lanes()):
        if tokens.results_left[e] > 0:
            for m in range(num_row_blocks(tokens.sent[e], p.tile_m_min, p.tile_m)):
                i = e * p.row_blocks + m
                if tokens.result_seen[i] != p.epoch and word_epoch(ld_relaxed(segments.result_flag, i)) == p.epoch:
                    acquire_flag(segments, e // p.experts_per_rank, segments.result_flag, i)
                    tokens.result_seen[i] = p.epoch
                    tokens.results_left[e] -= 1
                    land(p, tokens, queue, e, m)
                    landed += 1
    return landed


@jit
def land(p, tokens, queue, e, m):
    """One result chunk is here: its slots belong to a run of token blocks, because slots are in token order."""
    height = tile_height(tokens.sent[e], p.tile_m_min, p.tile_m)
    first = m * height
    end = min(first + height, tokens.sent[e])
    b = block_of_slot(p, tokens, e, first)
    while b < num_token_blocks(p) and tokens.bases[b * p.num_experts + e] < end:
        if tokens.counts[b * p.num_experts + e] > 0:
            need(p, tokens, queue, b, -1)
        b += 1


@jit
def block_of_slot(p, tokens, e, slot):
    """The last token block that begins at or before a slot of expert e: it holds the slot's row."""
    low, high = 0, num_token_blocks(p) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tokens.bases[middle * p.num_experts + e] <= slot:
            low = middle
        else:
            high = middle - 1
    return low


@jit
def blame(block, rank, packets_left, results_left):
    """Name a flag that this lane still waits for."""
    p, segments, tokens = rank.problem, rank.segments, rank.tokens
    if results_left < 0:
        record = AbortRecord(block, SUBSCRIBER, GATE_FLAG, p.rank_idx, 0, 0, p.epoch, 0, 1, p.deadline_ns)
        give_up(p, segments, record)
        return
    missing = packets_left + results_left
    packet = overdue_packet(p, segments, rank.received)
    if packet >= 0:
        source, expert = packet // p.experts_per_rank, packet % p.experts_per_rank
        found = ld_relaxed(segments.dispatch_flag, last_packet_flag(p, packet))
        record = AbortRecord(
            block, SUBSCRIBER, DISPATCH_FLAG, source, expert, 0, p.epoch, found, missing, p.deadline_ns
        )
        give_up(p, segments, record)
        return
    for e in range(lane(), p.num_experts, lanes()):
        for m in range(num_row_blocks(tokens.sent[e], p.tile_m_min, p.tile_m)):
            i = e * p.row_blocks + m
            if tokens.result_seen[i] != p.epoch:
                owner, expert = e // p.experts_per_rank, e % p.experts_per_rank
                found = ld_relaxed(segments.result_flag, i)
                record = AbortRecord(
                    block, SUBSCRIBER, RESULT_FLAG, owner, expert, m, p.epoch, found, missing, p.deadline_ns
                )
                give_up(p, segments, record)
                return


@jit
def overdue_packet(p, segments, received):
    """The first packet that this lane misses of a rank that does not wait itself, else the first it misses, or -1."""
    first = -1
    for packet in range(p.num_experts):
        source, expert = packet // p.experts_per_rank, packet % p.experts_per_rank
        if expert % lanes() == lane() and received.seen[packet] != p.epoch:
            if not waits_itself(p, segments, source):
                return packet
            if first < 0:
                first = packet
    return first
