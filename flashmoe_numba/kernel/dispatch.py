"""Dispatch: rows out to their experts' owners, one packet per expert."""

from __future__ import annotations

from flashmoe_numba.device import block_sync, copy_row, jit, lane, lanes, load, store

from .peers import packet_room, tell_packet
from .sizes import num_token_blocks
from .wire import first_row


@jit
def dispatch(p, tokens, segments, owner, expert):
    """Write one packet for its owner and tell it, also when it is empty."""
    e = owner * p.experts_per_rank + expert
    room, first_slot = packet_room(p, segments, owner), first_row(p, segments, owner, expert)
    for b in range(num_token_blocks(p)):
        i = b * p.num_experts + e
        slot = tokens.bases[i]
        first = b * p.token_block * p.num_topk + tokens.starts[i]
        for place in range(first, first + min(tokens.counts[i], p.slots - slot)):
            copy_token(p, room, (first_slot + slot) * p.hidden, tokens, tokens.order[place])
            slot += 1
    block_sync()
    if lane() == 0:
        tell_packet(p, segments, owner, expert, tokens.sent[e])


@jit
def copy_token(p, room, at, tokens, pair):
    """The row of a pair's token; times the pair's weight and rounded, where that is applied here."""
    source = pair // p.num_topk * p.hidden
    if p.weight_input:
        weight = tokens.topk_weights[pair]
        for c in range(lane(), p.hidden, lanes()):
            store(room, at + c, load(tokens.x, source + c) * weight)
    else:
        copy_row(room, at, tokens.x, source, p.hidden)
