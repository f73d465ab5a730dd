"""Which token goes to which experts, on all ranks at once, without the tokens themselves.

Routings are drawn, by a name of `drawn`, or recorded (`recorded`).

Invariants: the experts of a token are distinct; the same (name, sizes, seed) gives the same arrays; slots are given in
token order, as in `reference.packets`, and a capacity drops the last. Leaves out: routing weights, which cost nothing;
ranks with different numbers of tokens (a token that is not there has only choices of -1).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from reference.arrays import Array, check_array, stream
from reference.config import MoEConfig
from reference.scalars import make_plain

from . import streams
from .drawn import DRAWN, RECORDED, draw_choices
from .recorded import is_recorded, read_routing

ROUTING_NAMES = (*DRAWN, RECORDED)
ZERO = -2  # in `SimRouting.topk_idx`


@dataclass(frozen=True, kw_only=True, eq=False)
class SimRouting:
    """Which token goes to which experts, on all ranks.

    Args:
        name: what made it, for titles.
        num_experts: experts over all ranks; after `placement.balance` these are copies of experts.
        topk_idx: `[num_ranks, num_tokens, num_topk]` int32. -1: this choice goes nowhere, because it was none or was
            dropped; `ZERO`: it names a zero-computation expert, goes nowhere either, and may add the token.
        owner: `[num_experts]` int32, the rank on which an expert lives.
        dropped, added: choices that a capacity or rounding took away, and that rounding added, over all ranks.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """

    name: str
    num_experts: int
    topk_idx: Array
    owner: Array
    dropped: int = 0
    added: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        shapes: dict[str, tuple[int | None, ...]] = {"topk_idx": (None, None, None), "owner": (self.num_experts,)}
        for name, shape in shapes.items():
            if check_array(name, getattr(self, name), shape).dtype != np.int32:
                raise TypeError(f"{name} must have dtype int32, got {getattr(self, name).dtype}")
        _check_range("topk_idx", self.topk_idx, ZERO, self.num_experts)
        _check_range("owner", self.owner, 0, self.num_ranks)

    @property
    def num_ranks(self) -> int:
        return len(self.topk_idx)

    @property
    def num_tokens(self) -> int:
        """Tokens of each rank."""
        return int(self.topk_idx.shape[1])

    @property
    def num_topk(self) -> int:
        return int(self.topk_idx.shape[2])

    @cached_property
    def counts(self) -> Array:
        """`[num_ranks, num_experts]` int64, the rows of each (source, expert) packet."""
        flat = self.topk_idx.reshape(self.num_ranks, -1)
        rows = [np.bincount(choices[choices >= 0], minlength=self.num_experts) for choices in flat]
        return np.array(rows, np.int64).reshape(self.num_ranks, self.num_experts)

    def traffic(self, counts: Array) -> Array:
        """`[num_ranks, num_ranks]`, rows from each source to each owner, of `counts` `[num_ranks, num_experts]`."""
        result = np.zeros((self.num_ranks, self.num_ranks), np.int64)
        np.add.at(result.T, self.owner, counts.T)
        return result


def _check_range(name: str, values: Array, low: int, high: int) -> None:
    if values.size and not low <= values.min() <= values.max() < high:
        raise ValueError(f"{name} must have values in [{low}, {high}), got {values.min()} to {values.max()}")


def make_routing(name: str, config: MoEConfig, seed: int = 0, layer: int | None = None) -> SimRouting:
    """The routing `name` of `config.num_tokens` tokens on each rank, experts blocked.

    Choices beyond `config.capacity` are -1, and counted as dropped. `layer` is that of a recording which has several.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule; FileNotFoundError: no such recording.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, one of: {', '.join(ROUTING_NAMES)}; got {name!r}")
    shape = (config.num_ranks, config.num_tokens, config.num_topk)
    random = stream(seed, streams.ROUTING)
    if layer is not None and not is_recorded(name):
        raise ValueError(f"layer must be None for a routing that is drawn, {name}; got {layer}")
    made = read_routing(name, config, layer, random) if is_recorded(name) else None
    title, choices = made or (name, draw_choices(name, config, random, seed))
    topk_idx = choices.reshape(shape).astype(np.int32, copy=False)
    topk_idx[topk_idx >= config.num_experts] = ZERO
    beyond = np.zeros(shape, bool)
    if config.capacity is not None:
        beyond = packet_slots(topk_idx, config.num_experts) >= config.capacity
        topk_idx[beyond] = -1
    owner = blocked_owner(config.num_experts, config.num_ranks)
    dropped = int(beyond.sum())
    return SimRouting(name=title, num_experts=config.num_experts, topk_idx=topk_idx, owner=owner, dropped=dropped)


def blocked_owner(num_experts: int, num_ranks: int) -> Array:
    """`[num_experts]` int32: the first experts on rank 0, as many on the next, and so on."""
    return (np.arange(num_experts) // (num_experts // num_ranks)).astype(np.int32)


def packet_slots(topk_idx: Array, num_experts: int) -> Array:
    """`[num_ranks, num_tokens, num_topk]` int32: each choice's slot in its (source, expert) packet; -1 stays -1."""
    slots = np.empty(topk_idx.shape, np.int32)
    for choices, of_rank in zip(topk_idx, slots, strict=True):
        of_rank[:] = _slots_of_rank(choices.ravel(), num_experts).reshape(of_rank.shape)
    return slots


def _slots_of_rank(expert: Array, num_experts: int) -> Array:
    """The number of earlier choices of the same expert, or -1 if `expert` is -1 or `ZERO`."""
    expert = np.maximum(expert, -1)
    narrow = np.int16 if num_experts < 2**15 else np.int32  # NumPy sorts 16 bits by radix, five times as fast
    order = np.argsort(expert.astype(narrow), kind="stable")
    counts = np.bincount(expert + 1, minlength=num_experts + 1)  # those that go nowhere come first
    slot = np.empty(expert.size, np.int32)
    slot[order] = np.arange(expert.size) - np.repeat(np.cumsum(counts) - counts, counts)
    slot[expert < 0] = -1
    return slot
