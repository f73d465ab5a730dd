"""What a rank keeps of one call for its backward: the routing, its tokens, and what its experts received."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reference import MoEConfig
from reference.arrays import Array
from reference.backward_plan import kept_bytes
from reference.sizes import hidden_rows, num_normed

from ..kernel.state import Received, Tokens
from .protocols import Memory

# of `Tokens`: what the backward finds as the forward left it
ROUTING = ("topk_idx", "topk_weights", "place", "order", "counts", "starts", "bases", "sent")


@dataclass(frozen=True, kw_only=True, eq=False)
class KeptArrays:
    """Room for what a rank keeps of one call, however many tokens it has.

    Room for rows is taken for all that a rank can receive; where memory grows only those that come take any.

    Args:
        tokens: replacements for fields of `Tokens`, by name.
        received: likewise of `Received`.
    """

    tokens: dict[str, Array]
    received: dict[str, Array]


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """What a rank keeps of a call, from its forward to its backward.

    Args:
        x: its tokens, which are copied: they may have changed when their gradients are asked for.
        routed, has_logits: was a routing given, were logits?
    """

    arrays: KeptArrays
    x: Array
    num_tokens: int
    routed: bool
    has_logits: bool

    def in_tokens(self, tokens: Tokens) -> Tokens:
        return tokens._replace(**self.arrays.tokens | {"x": self.x})

    def in_received(self, received: Received) -> Received:
        return received._replace(**self.arrays.received)


class Keeping:
    """Of one rank: memory of calls that had their backward, or were closed, is taken for the next ones."""

    def __init__(self, config: MoEConfig, save: str, memory: Memory, tokens: Tokens) -> None:
        self._config, self._save, self._memory, self._tokens = config, save, memory, tokens
        self._free: list[KeptArrays] = []

    def take(self, x: Array, routed: bool, has_logits: bool) -> Kept:
        """For a call with these tokens, as the kernel sees them."""
        arrays = self._free.pop() if self._free else make_arrays(self._config, self._save, self._memory, self._tokens)
        own = arrays.tokens["x"][: x.size]
        self._memory.copy(own, x)
        num_tokens = x.size // self._config.hidden
        return Kept(arrays=arrays, x=own, num_tokens=num_tokens, routed=routed, has_logits=has_logits)

    def give_back(self, kept: Kept) -> None:
        self._free.append(kept.arrays)

    def num_bytes(self, kept: Kept, received: Received) -> int:
        """Of what was kept, once the call has ended; where memory does not grow, of all that was taken for it."""
        if not self._memory.grows:
            return sum(array.nbytes for group in vars(kept.arrays).values() for array in group.values())
        rows = int(self._memory.to_host(received.rows).sum())
        return kept_bytes(self._config, self._save, kept.num_tokens, rows)


def make_arrays(config: MoEConfig, save: str, memory: Memory, tokens: Tokens) -> KeptArrays:
    """A part of the call that began."""
    c, element, sums = config, config.format.storage, config.accumulator
    own = {name: memory.zeros(getattr(tokens, name).size, getattr(tokens, name).dtype) for name in ROUTING}
    keeps_rows, keeps_ups = save != "nothing", save == "rows+up"
    shared_ups = c.num_tokens * c.shared_ffn * c.shared_kind.num_ups if keeps_ups else 0
    own |= {
        "x": memory.empty(c.num_tokens * c.hidden, element),
        "kept_logits": memory.empty(c.num_tokens * c.num_choices, sums),
        "kept_results": memory.empty(num_normed(c) * c.hidden, element),
        "shared_ups": memory.empty(shared_ups, element),
        "shared_factors": memory.empty(c.num_tokens if c.shared_ffn else 0, sums),
    }
    memory.store(own["shared_factors"], np.ones(own["shared_factors"].size, sums))
    rows = hidden_rows(c)
    received = {
        "first": memory.zeros(c.num_experts, np.int64),
        "kept_rows": memory.empty(rows * c.hidden if keeps_rows else 0, element),
        "kept_ups": memory.empty(rows * c.ffn * c.expert_kind.num_ups if keeps_ups else 0, element),
    }
    return KeptArrays(tokens=own, received=received)
