"""The OS block: starts a call, polls signals, and turns each into tasks.

A lane polls every `lanes()`-th flag, so lanes share nothing but atomic counters. Packets become GEMM0 tasks; result
tiles count down the token blocks whose rows they hold, and a token block at zero becomes a COMBINE task. When the last
packet has been seen the number of this rank's tasks is known, and published for the processors to stop by.
"""

from __future__ import annotations

from flashmoe_numba.device import fetch_add, jit, lane, lanes, ld_acquire, ld_relaxed, now, pause, st_release
from reference.tiles import COMBINE, GATE, GEMM0

from .gate import num_gate_tasks, num_row_blocks, num_token_blocks, tile_height
from .queue import (
    GATE_OPEN,
    GEMM_TASKS,
    HIDDEN_ROWS,
    PACKETS_SEEN,
    TOTAL,
    counter,
    fill,
    push,
    reserve,
    zero_next_counters,
)
from .signals import (
    DISPATCH_FLAG,
    GATE_FLAG,
    RESULT_FLAG,
    SUBSCRIBER,
    aborted,
    give_up,
    is_silent,
    word_epoch,
    word_rows,
)
from .trace import RECEIVE, record


@jit
def os_block(p, block, segments, tokens, packets, queue, trace):
    if lane() == 0:
        zero_next_counters(p, queue)
        first = reserve(p, queue, num_gate_tasks(p))
        for b in range(num_gate_tasks(p)):
            fill(p, queue, first + b, GATE, 0, 0, b, 0)
    subscribe(p, block, segments, tokens, packets, queue, trace)


@jit
def subscribe(p, block, segments, tokens, packets, queue, trace):
    """Poll this lane's flags until all have been seen."""
    packets_left = (p.num_experts - lane() + lanes() - 1) // lanes()
    results_left = -1  # unknown until the gate is open
    attempt = 0
    since = now()
    progress = -1
    while packets_left > 0 or results_left != 0:
        seen = poll_packets(p, segments, packets, queue, trace)
        packets_left -= seen
        if results_left < 0 and ld_acquire(queue.counters, counter(p, GATE_OPEN)) != 0:
            results_left = count_results(p, tokens)
            seen += 1
        if results_left > 0:
            landed = poll_results(p, segments, tokens, queue)
            results_left -= landed
            seen += landed
        if seen > 0:
            attempt = 0
            since, progress = now(), -1
        else:
            if aborted(segments):
                return
            attempt = pause(attempt)
            silent, since, progress = is_silent(p, segments, since, p.deadline_ns // 2, progress)
            if silent:
                blame(p, block, segments, tokens, packets, packets_left, results_left)
                return


@jit
def poll_packets(p, segments, packets, queue, trace):
    """Admit this lane's packets that have arrived since the last look; returns how many."""
    seen = 0
    for packet in range(lane(), p.num_experts, lanes()):
        if packets.seen[packet] != p.epoch and word_epoch(ld_relaxed(segments.dispatch_flag, packet)) >= p.epoch:
            start = now()
            word = ld_acquire(segments.dispatch_flag, packet)
            packets.seen[packet] = p.epoch
            # A word of the next epoch: its sender has left this one, so its packet held nothing that we had to answer.
            rows = word_rows(word) if word_epoch(word) == p.epoch else 0
            admit(p, packets, queue, packet, rows)
            record(trace, RECEIVE, packet // p.experts_per_rank, packet % p.experts_per_rank, 0, rows, start)
            seen += 1
    return seen


@jit
def admit(p, packets, queue, packet, rows):
    """Queue a packet's GEMM0 tasks: column tile by column tile, so that row tiles find the weights in the cache."""
    packets.rows[packet] = rows
    packets.rows[packet] = rows
    if rows > 0:
        blocks = num_row_blocks(rows, p.tile_m_min, p.tile_m)
        up_tiles = (p.ffn + p.tile_ffn - 1) // p.tile_ffn
        down_tiles = (p.hidden + p.tile_hidden - 1) // p.tile_hidden
        padded = blocks * tile_height(rows, p.tile_m_min, p.tile_m)
        packets.first_row[packet] = fetch_add(queue.counters, counter(p, HIDDEN_ROWS), padded)
        fetch_add(queue.counters, counter(p, GEMM_TASKS), blocks * (up_tiles + down_tiles))
        place = reserve(p, queue, blocks * up_tiles)
        source, expert = packet // p.experts_per_rank, packet % p.experts_per_rank
        for n in range(up_tiles):
            for m in range(blocks):
                fill(p, queue, place + n * blocks + m, GEMM0, source, expert, m, n)
    if fetch_add(queue.counters, counter(p, PACKETS_SEEN), 1) + 1 == p.num_experts:
        gemms = ld_acquire(queue.counters, counter(p, GEMM_TASKS))
        total = num_gate_tasks(p) + p.num_experts + num_token_blocks(p) + gemms
        st_release(queue.counters, counter(p, TOTAL), total + 1)


@jit
def count_results(p, tokens):
    """Result tiles that this lane waits for."""
    tiles = 0
    for e in range(lane(), p.num_experts, lanes()):
        tiles += tokens.results_left[e]
    return tiles


@jit
def poll_results(p, segments, tokens, queue):
    """Land this lane's result tiles that have arrived since the last look; returns how many."""
    landed = 0
    for e in range(lane(), p.num_experts, lanes()):
        if tokens.results_left[e] > 0:
            for m in range(num_row_blocks(tokens.sent[e], p.tile_m_min, p.tile_m)):
                i = e * p.row_blocks + m
                if tokens.result_seen[i] != p.epoch and word_epoch(ld_relaxed(segments.result_flag, i)) == p.epoch:
                    ld_acquire(segments.result_flag, i)
                    tokens.result_seen[i] = p.epoch
                    tokens.results_left[e] -= 1
                    land(p, tokens, queue, e, m)
                    landed += 1
    return landed


@jit
def land(p, tokens, queue, e, m):
    """One result tile is here: its slots belong to a run of token blocks, because slots are in token order."""
    height = tile_height(tokens.sent[e], p.tile_m_min, p.tile_m)
    first = m * height
    end = min(first + height, tokens.sent[e])
    b = block_of_slot(p, tokens, e, first)
    while b < num_token_blocks(p) and tokens.bases[b * p.num_experts + e] < end:
        if tokens.counts[b * p.num_experts + e] > 0 and fetch_add(tokens.tiles_left, b, -1) == 1:
            push(p, queue, COMBINE, 0, 0, b, 0)
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
def blame(p, block, segments, tokens, packets, packets_left, results_left):
    """Name the first flag that this lane still waits for."""
    missing = packets_left + max(results_left, 0)
    for packet in range(lane(), p.num_experts, lanes()):
        if packets.seen[packet] != p.epoch:
            source, expert = packet // p.experts_per_rank, packet % p.experts_per_rank
            found = ld_relaxed(segments.dispatch_flag, packet)
            give_up(p, segments, block, SUBSCRIBER, DISPATCH_FLAG, source, expert, 0, found, missing)
            return
    if results_left < 0:
        give_up(p, segments, block, SUBSCRIBER, GATE_FLAG, p.rank_idx, 0, 0, 0, 1)
        return
    for e in range(lane(), p.num_experts, lanes()):
        for m in range(num_row_blocks(tokens.sent[e], p.tile_m_min, p.tile_m)):
            i = e * p.row_blocks + m
            if tokens.result_seen[i] != p.epoch:
                owner, expert = e // p.experts_per_rank, e % p.experts_per_rank
                found = ld_relaxed(segments.result_flag, i)
                give_up(p, segments, block, SUBSCRIBER, RESULT_FLAG, owner, expert, m, found, missing)
                return
