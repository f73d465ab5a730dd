"""Dispatch: rows out to their experts' owners, one packet per expert."""

from __future__ import annotations

from flashmoe_numba.device import block_sync, copy_row, jit, lane

from .peers import packet_room, tell_packet
from .sizes import num_token_blocks


@jit
def dispatch(p, tokens, segments, owner, expert):
    """Put one packet into its owner's segment and signal it, also when it is empty."""
    e = owner * p.experts_per_rank + expert
    packet = p.rank_idx * p.experts_per_rank + expert
    room = packet_room(p, segments, owner)
    for b in range(num_token_blocks(p)):
        i = b * p.num_experts + e
        slot = tokens.bases[i]
        first = b * p.token_block * p.num_topk + tokens.starts[i]
        for pair in range(first, first + min(tokens.counts[i], p.slots - slot)):
            token = tokens.order[pair] // p.num_topk
            copy_row(room, (packet * p.slots + slot) * p.hidden, tokens.x, token * p.hidden, p.hidden)
            slot += 1
    block_sync()
    if lane() == 0:
        tell_packet(p, segments, owner, packet, tokens.sent[e])
