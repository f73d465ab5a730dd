"""The gate: a token block's routing (router.py), then the slots of all pairs in token order.

A GATE task handles one token block and sorts its pairs by expert. The block that finishes last adds up the counts of
all token blocks, which gives every pair its slot without an atomic: routing, drops and slots depend on the tokens
alone.
"""

from __future__ import annotations

from flashmoe_numba.device import block_sync, fetch_add, jit, lane, lanes, st_release
from reference.task_kinds import DISPATCH

from .combine import need
from .queue import GATE_OPEN, GATES_DONE, QueueTask, counter, fill, reserve
from .router import route
from .shared import count_shared_tiles, queue_late_shared
from .sizes import num_gate_tasks, num_row_blocks, num_token_blocks, tile_height
from .state import IS_LAST


@jit
def gate(p, tokens, experts, queue, scratch, box, token_block):
    first = token_block * p.token_block
    rows = min(p.token_block, p.num_tokens - first)
    if rows > 0 and not p.routed:
        route(p, tokens, experts, scratch, first, rows)
    block_sync()
    sort_pairs(p, tokens, token_block, first * p.num_topk, rows * p.num_topk)
    block_sync()
    if lane() == 0:
        done = fetch_add(queue.counters, counter(p, GATES_DONE), 1) + 1
        box[IS_LAST] = done == num_gate_tasks(p)
    block_sync()
    if box[IS_LAST]:
        open_gate(p, tokens, queue)


@jit
def sort_pairs(p, tokens, token_block, first, num_pairs):
    """counts, starts, place and order of one token block. A lane owns the experts with index lane modulo lanes.

    A pair of index -1 chose no expert, one from num_experts on a zero-computation expert: they have no place.
    """
    at = token_block * p.num_experts
    for e in range(lane(), p.num_experts, lanes()):
        tokens.counts[at + e] = 0
    for pair in range(first, first + num_pairs):
        e = tokens.topk_idx[pair]
        if 0 <= e < p.num_experts and e % lanes() == lane():
            tokens.place[pair] = tokens.counts[at + e]
            tokens.counts[at + e] += 1
    block_sync()
    if lane() == 0:
        start = 0
        for e in range(p.num_experts):
            tokens.starts[at + e] = start
            start += tokens.counts[at + e]
    block_sync()
    for pair in range(first + lane(), first + num_pairs, lanes()):
        e = tokens.topk_idx[pair]
        if 0 <= e < p.num_experts:
            tokens.order[first + tokens.starts[at + e] + tokens.place[pair]] = pair


@jit
def open_gate(p, tokens, queue):
    """All counts are known: give out slots, then let dispatch begin and tell the OS block which results to expect."""
    for e in range(lane(), p.num_experts, lanes()):
        slot = 0
        for b in range(num_token_blocks(p)):
            tokens.bases[b * p.num_experts + e] = slot
            slot += tokens.counts[b * p.num_experts + e]
        tokens.sent[e] = min(slot, p.slots)
        tokens.results_left[e] = num_row_blocks(tokens.sent[e], p.tile_m_min, p.tile_m)
    block_sync()
    if lane() == 0:
        first = reserve(p, queue, p.num_experts)
        for i in range(p.num_experts):  # begin with the next rank, so that not all send to the same one first
            e = ((p.rank_idx + 1) * p.experts_per_rank + i) % p.num_experts
            fill(p, queue, first + i, QueueTask(DISPATCH, e // p.experts_per_rank, e % p.experts_per_rank, 0, 0))
        queue_late_shared(p, queue)
    block_sync()
    for b in range(lane(), num_token_blocks(p), lanes()):  # with nothing to wait for: no pair is sent
        need(p, tokens, queue, b, count_result_chunks(p, tokens, b) + count_shared_tiles(p, b))
    block_sync()
    if lane() == 0:
        st_release(queue.counters, counter(p, GATE_OPEN), 1)


@jit
def count_result_chunks(p, tokens, token_block):
    """Result chunks that hold a row of this token block."""
    chunks = 0
    for e in range(p.num_experts):
        i = token_block * p.num_experts + e
        first = tokens.bases[i]
        end = min(first + tokens.counts[i], p.slots)
        if first < end:
            height = tile_height(tokens.sent[e], p.tile_m_min, p.tile_m)
            chunks += (end - 1) // height - first // height + 1
    return chunks
