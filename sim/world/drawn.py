"""Choices of experts that are drawn, by the name of how.

    even       balanced: the packets of one source differ by at most one row, and so do the totals of the experts
    uniform    k distinct experts at random for each token
    zipf:s     popularity of experts ~ rank^-s, s >= 0, the ranks dealt to the experts at random; k distinct per token
    hot        every first choice is expert 0, the others uniform and distinct
    hot-rank   every first choice is one of rank 0's experts, the others uniform and distinct
    text       words of real text (`reference.make_workload`), routed by a random router over a short hidden row

Zero-computation experts are chosen as others are (behind them in `hot-rank`, which has one of rank 0's experts first).
The experts of a token are distinct. The same (name, sizes, seed) gives the same choices.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import numpy as np

from reference.arrays import Array
from reference.config import MoEConfig
from reference.routers import route
from reference.workloads import make_workload, zipf_exponent

DRAWN = ("even", "uniform", "zipf:s (s a number >= 0)", "hot", "hot-rank", "text")
RECORDED = "a path ending in .npz, .npy, .safetensors or .csv"
TEXT_HIDDEN = 64
STEEPEST = 1e30  # exponent of zipf: fits float32, and has left the second expert nothing for long
CHUNK = 1 << 20  # random numbers at once: they stay in the cache


def draw_choices(name: str, config: MoEConfig, random: np.random.Generator, seed: int) -> Array:
    """`[num_ranks * num_tokens, num_topk]`, the choices of all tokens, rank after rank.

    Raises:
        ValueError: no such name; lists those there are, and that a path is one, too.
    """
    exponent = zipf_exponent(name)
    if exponent is not None:
        return _zipf(config, random, exponent)
    makers = {"even": _even, "uniform": _uniform, "hot": _hot, "hot-rank": _hot_rank}
    if name in makers:
        return makers[name](config, random)
    if name == "text":
        return _text(config, random, seed)
    raise ValueError(f"name must be one of: {', '.join(DRAWN)}, {RECORDED}; got {name!r}")


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
