"""Which token goes to which experts, on all ranks at once, without the tokens themselves.

    even       balanced: the packets of one source differ by at most one row, and so do the totals of the experts
    uniform    k distinct experts at random for each token
    zipf:s     popularity of experts ~ rank^-s, s >= 0, the ranks dealt to the experts at random; k distinct per token
    hot        every first choice is expert 0, the others uniform and distinct
    hot-rank   every first choice is one of rank 0's experts, the others uniform and distinct
    text       words of real text (`reference.make_workload`), routed by a random router over a short hidden row
    *.npz, *.npy, *.safetensors, *.csv   recorded choices, or a histogram of each expert's tokens: see `recorded`

Zero-computation experts are chosen as others are (behind them in `hot-rank`, which has one of rank 0's experts first).

Invariants: the experts of a token are distinct; the same (name, sizes, seed) gives the same arrays; slots are given in
token order, as in `reference.packets`, and a capacity drops the last. Leaves out: routing weights, which cost nothing;
ranks with different numbers of tokens (a token that is not there has only choices of -1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

import numpy as np

from reference.arrays import Array, check_array, stream
from reference.config import MoEConfig
from reference.routers import route
from reference.scalars import make_plain
from reference.workloads import make_workload, zipf_exponent

from . import streams
from .recorded import is_recorded, read_routing

ROUTING_NAMES = (
    "even", "uniform", "zipf:s (s a number >= 0)", "hot", "hot-rank", "text",
    "a path ending in .npz, .npy, .safetensors or .csv",
)  # fmt: skip
TEXT_HIDDEN = 64
STEEPEST = 1e30  # exponent of zipf: fits float32, and has left the second expert nothing for long
ZERO = -2  # in `SimRouting.topk_idx`
CHUNK = 1 << 20  # random numbers at once: they stay in the cache


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
    """The routing `name` (see the module's table) of `config.num_tokens` tokens on each rank, experts blocked.

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
    title, choices = made or (name, _choices(name, config, random, seed))
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


def _choices(name: str, config: MoEConfig, random: np.random.Generator, seed: int) -> Array:
    """The choices of all tokens, rank after rank, nothing dropped."""
    exponent = zipf_exponent(name)
    if exponent is not None:
        return _zipf(config, random, exponent)
    makers = {"even": _even, "uniform": _uniform, "hot": _hot, "hot-rank": _hot_rank}
    if name in makers:
        return makers[name](config, random)
    if name == "text":
        return _text(config, random, seed)
    raise ValueError(f"name must be one of: {', '.join(ROUTING_NAMES)}; got {name!r}")


def _even(config: MoEConfig, random: np.random.Generator) -> Array:
    """Tokens take k experts each from a shuffled circle of all experts, so their experts are distinct.

    A circle is left after `period` tokens, when it has come out even. A rank's last tokens, too few for that, go on
    where those of the rank before stopped, in one circle that all ranks share: that keeps the totals even as well.
    """
    num_ranks, num_experts, num_topk = config.num_ranks, config.num_choices, config.num_topk
    period = num_experts // gcd(num_experts, num_topk)
    rounds, rest = divmod(config.num_tokens, period)
    circles = np.tile(np.arange(num_experts, dtype=np.int32), (num_ranks, rounds, 1))
    position = np.arange(period * num_topk) % num_experts
    full = random.permuted(circles, axis=-1)[:, :, position].reshape(num_ranks, -1)
    position = np.arange(num_ranks * rest * num_topk) % num_experts
    last = random.permutation(num_experts)[position].astype(np.int32).reshape(num_ranks, -1)
    return np.concatenate([full, last], axis=1)


def _uniform(config: MoEConfig, random: np.random.Generator) -> Array:
    return _distinct(config.num_ranks * config.num_tokens, config.num_topk, config.num_choices, random)


def _distinct(num_rows: int, num_picks: int, num_experts: int, random: np.random.Generator) -> Array:
    """`[num_rows, num_picks]` int32: uniform among the rows of distinct experts, in any order.

    Floyd's sampling: a pick that is taken already becomes the one expert that no earlier pick could be (Bentley and
    Floyd, Communications of the ACM 30(9), 1987). Shuffled, because the last expert can only come last.
    """
    picks = np.empty((num_picks, num_rows), np.int32)
    for pick in range(num_picks):
        newest = num_experts - num_picks + pick
        drawn = random.integers(newest + 1, size=num_rows, dtype=np.int32)
        drawn[(picks[:pick] == drawn).any(axis=0)] = newest
        picks[pick] = drawn
    return random.permuted(np.ascontiguousarray(picks.T), axis=1)


def _hot(config: MoEConfig, random: np.random.Generator) -> Array:
    return _with_first(np.zeros(config.num_ranks * config.num_tokens, np.int32), config, random)


def _hot_rank(config: MoEConfig, random: np.random.Generator) -> Array:
    num_tokens = config.num_ranks * config.num_tokens
    return _with_first(random.integers(config.num_experts_per_rank, size=num_tokens, dtype=np.int32), config, random)


def _with_first(first: Array, config: MoEConfig, random: np.random.Generator) -> Array:
    """The first choices as given, the others uniform among the other experts."""
    others = _distinct(len(first), config.num_topk - 1, config.num_choices - 1, random)
    others += others >= first[:, None]
    return np.concatenate([first[:, None], others], axis=1)


def _zipf(config: MoEConfig, random: np.random.Generator, exponent: float) -> Array:
    """Drawn one after the other without replacement: both ways below mean the same."""
    log_popularity = -min(exponent, STEEPEST) * np.log(np.arange(1, config.num_choices + 1))
    popularity = np.exp(log_popularity)
    always_left = popularity[config.num_topk :].sum() / popularity.sum()
    draw = _redrawn if always_left > 0.1 else _raced  # 1 s or 14 s for a million tokens over 1024 experts
    by_popularity = draw(log_popularity, config.num_ranks * config.num_tokens, config.num_topk, random)
    experts: Array = random.permutation(config.num_choices).astype(np.int32)[by_popularity]
    return experts


def _redrawn(log_popularity: Array, num_rows: int, num_picks: int, random: np.random.Generator) -> Array:
    """`[num_rows, num_picks]`: a pick that is taken already is drawn again."""
    cumulative = np.cumsum(np.exp(log_popularity))
    cumulative /= cumulative[-1]
    picks = np.empty((num_picks, num_rows), np.int32)
    for pick in range(num_picks):
        rows = np.arange(num_rows)
        while rows.size:
            drawn = np.searchsorted(cumulative, random.random(rows.size), side="right")
            picks[pick, rows] = drawn
            rows = rows[(picks[:pick, rows] == drawn).any(axis=0)]
    return picks.T


def _raced(log_popularity: Array, num_rows: int, num_picks: int, random: np.random.Generator) -> Array:
    """The same as the largest k of log-popularity plus Gumbel noise, which is -log of an exponential variable."""
    log_popularity = log_popularity.astype(np.float32)
    picks = np.empty((num_rows, num_picks), np.int32)
    step = max(1, CHUNK // len(log_popularity))
    for start in range(0, num_rows, step):
        rows = picks[start : start + step]
        noise = random.standard_exponential((len(rows), len(log_popularity)), dtype=np.float32)
        with np.errstate(divide="ignore"):  # log 0 = -inf wins, as it should
            rows[:] = _smallest(np.log(noise, out=noise) - log_popularity, num_picks)
    return picks


def _smallest(keys: Array, num_picks: int) -> Array:
    """The columns of the smallest keys of each row, smallest first."""
    some_order = np.argpartition(keys, num_picks - 1, axis=1)[:, :num_picks]
    order = np.argsort(np.take_along_axis(keys, some_order, axis=1), axis=1)
    return np.take_along_axis(some_order, order, axis=1)


def _text(config: MoEConfig, random: np.random.Generator, seed: int) -> Array:
    """Equal words go to equal experts, so each word is routed once.

    Router rows have equal length: in a short hidden row they would vary more than in a long one, and a long router
    row makes a popular expert.
    """
    num_tokens = config.num_ranks * config.num_tokens
    short = replace(config, num_ranks=1, num_tokens=num_tokens, hidden=TEXT_HIDDEN, dtype="float32", capacity=None)
    (x,) = make_workload("text", short, seed=seed).x  # of all ranks
    key = np.ascontiguousarray(x[:, :2]).view(np.uint64).ravel()  # two random floats tell words apart
    _, first, word = np.unique(key, return_index=True, return_inverse=True)
    router = random.standard_normal((config.num_choices, TEXT_HIDDEN))
    router /= np.linalg.norm(router, axis=1, keepdims=True)
    choices: Array = route(x[first], router, short).topk_idx[word]
    return choices


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
