"""What a rank keeps of one call for its backward: the routing, its tokens, and what its experts received."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reference import MoEConfig
from reference.arrays import Array
from reference.plan import hidden_rows

from ..kernel.state import Received, Tokens
from .protocols import Memory

# of `Tokens`: what the backward finds as the forward left it
ROUTING = ("kept_logits", "topk_idx", "topk_weights", "place", "order", "counts", "starts", "bases", "sent")
OF_SHARED = ("shared_ups", "shared_factors")


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Arrays of one rank, which belong to one call from its forward to its backward.

    Room for rows is taken for all that a rank can receive; on a CPU only those that came take memory.

    Args:
        tokens: replacements for fields of `Tokens`, by name; the tokens themselves among them.
        received: likewise of `Received`.
        routed, has_logits: was a routing given, were logits?
    """

    tokens: dict[str, Array]
    received: dict[str, Array]
    num_tokens: int
    routed: bool
    has_logits: bool

    def in_tokens(self, tokens: Tokens) -> Tokens:
        return tokens._replace(**self.tokens)

    def in_received(self, received: Received) -> Received:
        return received._replace(**self.received)


def make_kept(
    config: MoEConfig, save: str, memory: Memory, x: Array, tokens: Tokens, routed: bool, has_logits: bool
) -> Kept:
    """Room for a call with these tokens, which are copied: they may have changed when their gradients are asked for."""
    c, element, sums = config, config.format.storage, config.accumulator
    num_tokens = x.size // c.hidden
    own_x = memory.empty(x.size, element)
    own_x[:] = x
    of_tokens = {name: memory.zeros(getattr(tokens, name).size, getattr(tokens, name).dtype) for name in ROUTING[1:]}
    of_tokens |= {"x": own_x, "kept_logits": memory.empty(0 if routed else num_tokens * c.num_choices, sums)}
    shared = num_tokens * c.shared_ffn
    ups = shared * c.shared_kind.num_ups if save == "rows+up" else 0
    of_tokens |= {
        "shared_ups": memory.empty(ups, element),
        "shared_factors": memory.array(np.ones(num_tokens if c.shared_ffn else 0, sums)),
    }
    rows = hidden_rows(c)
    received = {
        "first": memory.zeros(c.num_experts, np.int64),
        "kept_rows": memory.empty(0 if save == "nothing" else rows * c.hidden, element),
        "kept_ups": memory.empty(rows * c.ffn * c.expert_kind.num_ups if save == "rows+up" else 0, element),
    }
    return Kept(
        tokens=of_tokens, received=received, num_tokens=num_tokens, routed=routed, has_logits=has_logits
    )  # fmt: skip


def kept_bytes(config: MoEConfig, save: str, num_tokens: int, num_rows: int, routed: bool = False) -> int:
    """Bytes of what a rank keeps of a call with so many tokens of its own, whose experts received so many rows."""
    c, element, sums = config, config.format.num_bytes, config.format.sums.num_bytes
    blocks = -(-c.num_tokens // c.token_block)
    pairs = c.num_tokens * c.num_topk
    routing = pairs * (3 * 4 + sums) + 3 * blocks * c.num_experts * 4 + c.num_experts * (4 + 8)
    tokens = num_tokens * (c.hidden * element + (0 if routed else c.num_choices * sums))
    row = 0 if save == "nothing" else c.hidden
    ups = save == "rows+up"
    row += ups * c.ffn * c.expert_kind.num_ups
    shared = num_tokens * (ups * c.shared_ffn * c.shared_kind.num_ups * element + sums) if c.shared_ffn else 0
    return routing + tokens + shared + num_rows * row * element
