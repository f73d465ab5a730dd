"""The way out of a backward: rows of dy, in the slots that their tokens had, with the factors of their results.

Where results went through a norm, rows are what this makes of dy (norm.py).
"""

from __future__ import annotations

from flashmoe_numba.device import block_sync, fetch_add, jit, lane

from ..dispatch import copy_token
from ..gate import open_gate
from ..peers import again_room, factor_room, packet_room, tell_packet
from ..queue import GATES_DONE, counter
from ..sizes import num_token_blocks
from ..wire import first_row
from .norm import copy_gradient, make_dots, queue_norm_weights


@jit
def reopen_gate(p, tokens, queue):
    """The routing is the forward's: slots follow from it as they did there."""
    if lane() == 0:
        fetch_add(queue.counters, counter(p, GATES_DONE), 1)
    open_gate(p, tokens, queue)


@jit
def dispatch(p, tokens, segments, experts, back, queue, owner, expert):
    """Write one packet for its owner and tell it, also when it is empty."""
    e, first_slot = owner * p.experts_per_rank + expert, first_row(p, segments, owner, expert)
    room, factors = packet_room(p, segments, owner), factor_room(p, segments, owner)
    again, norm = again_room(p, segments, owner), experts.norm
    if norm.scale.size > 0:
        make_packet_dots(p, tokens, norm, back, e)
        block_sync()
    for b in range(num_token_blocks(p)):
        i = b * p.num_experts + e
        slot = tokens.bases[i]
        first = b * p.token_block * p.num_topk + tokens.starts[i]
        for place in range(first, first + min(tokens.counts[i], p.slots - slot)):
            pair, row = tokens.order[place], first_slot + slot
            copy_gradient(p, room, row * p.hidden, tokens, norm, back, pair)
            if p.resends:
                copy_token(p, again, row * p.hidden, tokens, pair)
            if lane() == 0:
                factors[row] = factor_of(p, experts.rule, tokens.topk_weights[pair])
            slot += 1
    block_sync()
    if lane() == 0:
        tell_packet(p, segments, owner, expert, tokens.sent[e])
        if p.norm_weight_tasks > 0:
            queue_norm_weights(p, back, queue)


@jit
def make_packet_dots(p, tokens, norm, back, e):
    """What the norm's gradients need, of all pairs of a packet for the layer's expert `e`."""
    for b in range(num_token_blocks(p)):
        i = b * p.num_experts + e
        first = b * p.token_block * p.num_topk + tokens.starts[i]
        make_dots(p, tokens, norm, back, first, first + min(tokens.counts[i], p.slots - tokens.bases[i]))


@jit
def factor_of(p, rule, weight):
    """What the pair's result was multiplied by: 1, where the token was already multiplied by the weight."""
    return rule.one if p.weight_input and weight != 0 else weight
