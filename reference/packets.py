"""Which rows one source rank sends to which expert, in which slots, and which it drops (FlashMoE, sections 2 and 3.2).

A packet is the rows of one (source, expert). Slots are given in token order: a prefix sum over the flattened (token, j)
pairs, not a race, so what is dropped does not depend on timing. Pairs beyond the capacity are dropped. A pair of index
-1 chose no expert, and one from `num_experts` on a zero-computation expert: it is in no packet, and is not dropped
either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Array
from .config import MoEConfig


@dataclass(frozen=True, eq=False)
class Packets:
    """The packets of one source rank. A pair is an index `token * num_topk + j`.

    Args:
        topk_idx: `[num_tokens, num_topk]`, the routing they follow from.
        counts: `[num_experts]`, pairs routed to each expert.
        sent: `[num_experts]`, the rows of each packet: the pairs that fit the capacity.
        slot: `[num_tokens, num_topk]` int32, the pair's slot in its packet, or -1 if it is in none.
        order: `[pairs that chose an expert]`, these pairs by expert, in token order within each.
    """

    topk_idx: Array
    counts: Array
    sent: Array
    slot: Array
    order: Array

    def pairs(self, expert: int) -> Array:
        """`[sent[expert]]`: the pairs in the packet to `expert`, in slot order."""
        first = int(self.counts[:expert].sum())
        pairs: Array = self.order[first : first + self.sent[expert]]
        return pairs

    @property
    def dropped(self) -> int:
        """Pairs that chose an expert and that no packet holds."""
        return int(self.counts.sum() - self.sent.sum())


def make_packets(topk_idx: Array, config: MoEConfig) -> Packets:
    """The packets of a source with the routing `topk_idx` `[num_tokens, num_topk]`.

    A source may have any number of tokens: without a capacity nothing is dropped, whatever `config.num_tokens` says.
    """
    expert = topk_idx.ravel()
    chose = (expert >= 0) & (expert < config.num_experts)
    counts = np.bincount(expert[chose], minlength=config.num_experts)
    sent = counts if config.capacity is None else np.minimum(counts, config.capacity)
    order = np.argsort(expert, kind="stable")
    order = order[chose[order]]
    slot = np.full(expert.size, -1, np.int32)
    places = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
    slot[order] = np.where(places < sent[expert[order]], places, -1)
    return Packets(topk_idx, counts, sent, slot.reshape(topk_idx.shape), order)
