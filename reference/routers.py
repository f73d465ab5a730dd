"""From tokens to experts: softmax over all experts, then the greedy top-k (FlashMoE, section 2), or one from outside.

Invariants: a token's routing depends on that token only. Experts of a row are distinct, best first; equal logits are
taken by the lowest expert index. A routing from outside may leave choices out: index -1. Leaves out: sigmoid and
group-limited routers, selection biases; such models route outside and bring `topk_idx, topk_weights`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .arrays import Array, check_array, check_floating, overflowed
from .config import MoEConfig
from .tolerance import GROWTH


@dataclass(frozen=True, eq=False)
class Routing:
    """Experts of each token, best first, and the factors of their results.

    Args:
        topk_idx: `[num_tokens, num_topk]` int32, global expert indices; from `num_experts` on zero-computation experts;
            -1: no choice (only from outside).
        topk_weights: `[num_tokens, num_topk]` floating; that of no choice is 0.
    """

    topk_idx: Array
    topk_weights: Array


def softmax_topk(logits: Array, num_topk: int, renormalize: bool) -> Routing:
    """The k best experts of each row of `logits` `[num_tokens, num_choices]`, computed in the dtype of `logits`.

    Weights are the softmax probabilities p, or with `renormalize` p / (sum of the k chosen p). The choice is made on
    logits: the same order as that of p, but without the ties that underflow would make.

    A row without a largest finite logit (it has a NaN or +inf, or only -inf) goes to experts 0 to k - 1 with NaN
    weights: bad input stays in its token's row, where it is seen, and hits no other token.
    """
    good = np.isfinite(logits.max(axis=1))  # the maximum is NaN if any logit is
    safe = np.where(good[:, None], logits, 0)  # equal logits: experts 0 to k - 1
    idx = np.argsort(-safe, axis=1, kind="stable")[:, :num_topk]
    with np.errstate(over="ignore"):  # a difference of -inf is a probability of 0
        exponentials = np.exp(safe - safe.max(axis=1, keepdims=True))
    weights = np.take_along_axis(exponentials, idx, axis=1)
    weights /= (weights if renormalize else exponentials).sum(axis=1, keepdims=True)
    weights[~good] = np.nan
    return Routing(idx.astype(np.int32), weights)


CHOICES = {"softmax": softmax_topk}  # by `RouterKind.score`


def choose(logits: Array, config: MoEConfig) -> Routing:
    """The routing by `logits` `[num_tokens, num_choices]` as the config's kind of router has it, in their dtype."""
    kind = config.router_kind
    return CHOICES[kind.score](logits, config.num_topk, kind.renormalize)


def route(x: Array, router: Array, config: MoEConfig) -> Routing:
    """The routing of `x` `[num_tokens, hidden]` by `router` `[num_choices, hidden]`, in float64.

    Logits beyond the range of `config.accumulator`, in which an implementation has them, are infinite: a token whose
    largest logit is has NaN weights (`softmax_topk`).
    """
    return choose(overflowed(_logits(x, router), config.accumulator), config)


def _logits(x: Array, router: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        logits: Array = x.astype(np.float64) @ router.astype(np.float64).T
    return logits


def external_routing(topk_idx: Array, topk_weights: Array, config: MoEConfig, num_tokens: int) -> Routing:
    """A checked copy of a routing made elsewhere.

    Args:
        topk_idx: `[num_tokens, num_topk]`, any integer dtype, experts distinct in each row. -1 and `num_choices`, which
            frameworks pad with, are no choice, as often as you like: no slot, nothing sent, nothing added. (With
            zero-computation experts `num_experts` is the first of these.)
        topk_weights: `[num_tokens, num_topk]`, any floating dtype; used as they are, not normalised. That of no choice
            is not looked at.

    Returns:
        Indices as int32, weights as `config.accumulator`; no choice is index -1 and weight 0.

    Raises:
        TypeError, ValueError: naming the argument, the row, its values and the rule.
    """
    shape = (num_tokens, config.num_topk)
    if check_array("topk_idx", topk_idx, shape).dtype.kind not in "iu":
        raise TypeError(f"topk_idx must have an integer dtype, got {topk_idx.dtype}")
    check_floating("topk_weights", check_array("topk_weights", topk_weights, shape))
    end, name = config.num_choices, "num_choices" if config.num_zero else "num_experts"
    outside = (topk_idx.min(axis=1) < -1) | (topk_idx.max(axis=1) > end)
    rule = f"values must be in [0, {name}={end}), or -1 or {end} for no choice"
    _raise_at(outside, topk_idx, rule)
    chosen = (topk_idx >= 0) & (topk_idx < end)
    idx, weights = np.full(shape, -1, np.int32), np.zeros(shape, config.accumulator)
    idx[chosen], weights[chosen] = topk_idx[chosen], topk_weights[chosen]
    _raise_at(_has_repeats(idx), topk_idx, "the experts of a token must be distinct")
    return Routing(idx, weights)


def _has_repeats(topk_idx: Array) -> npt.NDArray[np.bool_]:
    """`[num_tokens]`: does the row name an expert twice? No choice (-1) is no expert."""
    ordered = np.sort(topk_idx, axis=1)
    repeats: npt.NDArray[np.bool_] = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    return repeats


def _raise_at(bad: npt.NDArray[np.bool_], topk_idx: Array, rule: str) -> None:
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(f"topk_idx: {rule}, got {topk_idx[row].tolist()} in row {row}")


def check_routing(routing: Routing, x: Array, router: Array, config: MoEConfig) -> str | None:
    """None if `routing`, made in `config.accumulator` precision, is a top-k of the exact logits up to rounding.

    Each logit may be off by `slack = GROWTH * u * sqrt(hidden) * |x| * max|router row|`: every partial sum is at most
    |x||router row| (Cauchy-Schwarz), so each of `hidden` roundings is at most u times that. So a chosen logit may be
    2 slack below the k-th best, and a weight may be off by a factor of exp(2 slack), beside the rounding of exp itself.
    Rows that are not finite in x, or whose logits may overflow the accumulator, are skipped.

    Returns:
        None, or a sentence that names the first bad token, its values and the rule.
    """
    idx = check_array("routing.topk_idx", routing.topk_idx, (len(x), config.num_topk))
    weights = check_array("routing.topk_weights", routing.topk_weights, idx.shape).astype(np.float64)
    bound = _logit_bound(x, router)
    with np.errstate(over="ignore"):
        checked = np.isfinite(bound.astype(config.accumulator))
    legal = (idx >= 0).all(axis=1) & (idx < config.num_choices).all(axis=1) & ~_has_repeats(idx)
    if not legal.all():
        row = int((~legal).argmax())
        return f"token {row}: experts {idx[row].tolist()} must be distinct and in [0, {config.num_choices})"
    tokens = np.flatnonzero(checked)
    slack = GROWTH * config.format.sums.unit_roundoff * config.hidden**0.5 * bound[tokens, None]
    return _compare(tokens, idx[tokens], weights[tokens], _logits(x[tokens], router), slack, config)


def _logit_bound(x: Array, router: Array) -> Array:
    """`[num_tokens]`: no partial sum of a logit of that token is larger; not finite if x is not."""
    with np.errstate(over="ignore"):
        sizes = np.linalg.norm(x.astype(np.float64), axis=1)
        bound: Array = sizes * np.linalg.norm(router.astype(np.float64), axis=1).max()
    return bound


def _compare(tokens: Array, idx: Array, weights: Array, logits: Array, slack: Array, config: MoEConfig) -> str | None:
    """The three rules of `check_routing` on its checked rows; `tokens` are their indices in x."""
    chosen = np.take_along_axis(logits, idx, axis=1)
    floor = -np.sort(-logits, axis=1)[:, config.num_topk - 1 : config.num_topk] - 2 * slack
    rising = np.zeros(idx.shape, bool)
    rising[:, 1:] = chosen[:, 1:] > chosen[:, :-1] + 2 * slack
    expected, margin = _expected_weights(logits, chosen, slack, config)
    rules = {
        "a chosen logit is below the k-th best": (chosen < floor, chosen, floor + np.zeros_like(chosen)),
        "the experts are not in falling order of logits": (rising, chosen, np.sort(chosen, axis=1)[:, ::-1]),
        "a weight is not that expert's probability": (~(np.abs(weights - expected) <= margin), weights, expected),
    }
    for rule, (bad, got, wanted) in rules.items():
        if bad.any():
            row = int(bad.any(axis=1).argmax())
            values = f"got {got[row].tolist()}, expected {wanted[row].tolist()}, slack {slack[row, 0]:.1e}"
            return f"token {tokens[row]}, experts {idx[row].tolist()}: {rule}: {values}"
    return None


def _expected_weights(logits: Array, chosen: Array, slack: Array, config: MoEConfig) -> tuple[Array, Array]:
    """Exact weights of the chosen experts, and how far computed ones may be off."""
    best = logits.max(axis=1, keepdims=True)
    exponentials = np.exp(chosen - best)
    total = (exponentials if config.router_kind.renormalize else np.exp(logits - best)).sum(axis=1, keepdims=True)
    # A float exp(z) is off by u |z| from the rounding of its argument, and by a few u; the sum by sqrt(num_choices) u.
    roundoff = config.format.sums.unit_roundoff
    ulps = GROWTH * (best - chosen + config.num_choices**0.5 + 1)
    expected: Array = exponentials / total
    factor = np.expm1(np.minimum(2 * slack, 700))  # beyond, anything may come out, and the product must not be 0 * inf
    return expected, expected * (factor + roundoff * ulps) + float(np.finfo(config.accumulator).tiny)
