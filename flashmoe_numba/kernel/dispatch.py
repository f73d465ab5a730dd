"""Dispatch and combine: rows out to their experts' owners, and results back into token order."""

from __future__ import annotations

from flashmoe_numba.device import array_at, block_sync, copy_row, jit, lane, lanes, load, st_release, store

from .gate import num_token_blocks
from .signals import signal_word


@jit
def dispatch(p, tokens, segments, owner, expert):
    """Put one packet into its owner's segment and signal it, also when it is empty."""
    e = owner * p.experts_per_rank + expert
    packet = p.rank_idx * p.experts_per_rank + expert
    target = array_at(segments.address[owner] + p.dispatch_at, p.region_elements, tokens.x)
    for b in range(num_token_blocks(p)):
        i = b * p.num_experts + e
        slot = tokens.bases[i]
        first = b * p.token_block * p.num_topk + tokens.starts[i]
        for pair in range(first, first + min(tokens.counts[i], p.slots - slot)):
            token = tokens.order[pair] // p.num_topk
            copy_row(target, (packet * p.slots + slot) * p.hidden, tokens.x, token * p.hidden, p.hidden)
            slot += 1
    block_sync()
    if lane() == 0:
        flags = array_at(segments.address[owner] + p.dispatch_flag_at, p.num_experts, segments.control)
        st_release(flags, packet, signal_word(p.epoch, tokens.sent[e]))


@jit
def combine(p, tokens, segments, scratch, token_block):
    """y = sum of weight * result over a token's choices, in that order; a dropped pair adds nothing."""
    first = token_block * p.token_block
    for token in range(first, min(first + p.token_block, p.num_tokens)):
        for c in range(lane(), p.hidden, lanes()):
            store(scratch.sums, c, tokens.topk_weights.dtype.type(0))
        for j in range(p.num_topk):
            pair = token * p.num_topk + j
            e = tokens.topk_idx[pair]
            slot = tokens.bases[token_block * p.num_experts + e] + tokens.place[pair]
            if slot < p.slots:
                add_row(p, segments, scratch, e * p.slots + slot, tokens.topk_weights[pair])
        for c in range(lane(), p.hidden, lanes()):
            store(tokens.y, token * p.hidden + c, load(scratch.sums, c))


@jit
def add_row(p, segments, scratch, row, weight):
    for c in range(lane(), p.hidden, lanes()):
        store(scratch.sums, c, load(scratch.sums, c) + weight * load(segments.result, row * p.hidden + c))
