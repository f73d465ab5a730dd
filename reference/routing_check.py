"""The judge of a routing that an implementation made: is it one of those that rounding allows?

Every quantity of the exact routing gets an interval that a computed one must be in, from that of the logits on; so the
same rules hold for every kind of router. Leaves out: rows that are not finite, and those whose logits may overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Array, check_array
from .config import MoEConfig
from .layer_kinds import RouterKind
from .routers import (
    Routing,
    choice_values,
    exact_logits,
    group_scores,
    has_repeats,
    prepared_logits,
    scores_of,
    sparsemixer,
    weigh,
)
from .tolerance import GROWTH
from .weights import Weights


def check_routing(routing: Routing, x: Array, router: Array | Weights, config: MoEConfig) -> str | None:
    """None if `routing`, made in `config.accumulator` precision, is a top-k of the exact logits up to rounding.

    Each logit may be off by `slack = GROWTH * u * sqrt(hidden) * |x| * max|router row|`: every partial sum is at most
    |x||router row| (Cauchy-Schwarz), so each of `hidden` roundings is at most u times that. A bias and a scale of
    logits make both larger; a cap makes neither larger. A score f(z) is then off by a factor of exp(2 slack) at most,
    since |d log f / dz| is at most 1 for each kind of score, and 2 between two logits for softmax, and by its own
    roundings. So a chosen expert may be behind one that is not, and behind the one before it in its row, where these
    intervals touch; where a group may or may not be open, an expert of it has the interval from closed to open.
    Rows that are not finite in x, or whose logits may overflow the accumulator, are skipped.

    Args:
        router: the matrix, or weights for a kind that asks for biases or scales. Of choice "given" the weights are
            checked, and not the experts.

    Returns:
        None, or a sentence that names the first bad token, its values and the rule.
    """
    kind = config.router_kind
    idx = check_array("routing.topk_idx", routing.topk_idx, (len(x), config.num_topk))
    factors = check_array("routing.topk_weights", routing.topk_weights, idx.shape).astype(np.float64)
    bound = _logit_bound(x, router, kind)
    with np.errstate(over="ignore"):
        checked = np.isfinite(bound.astype(config.accumulator))
    least = -1 if kind.choice == "given" else 0
    legal = (idx >= least).all(axis=1) & (idx < config.num_choices).all(axis=1) & ~has_repeats(idx)
    if not legal.all():
        row = int((~legal).argmax())
        return f"token {row}: experts {idx[row].tolist()} must be distinct and in [0, {config.num_choices})"
    tokens = np.flatnonzero(checked)
    u = config.format.sums.unit_roundoff
    slack = GROWTH * u * config.hidden**0.5 * bound[tokens, None]
    weights = router if isinstance(router, Weights) else None
    z = prepared_logits(exact_logits(x[tokens], router), kind, weights, config.accumulator)
    exact = _Exact(kind, weights, z, scores_of(z, kind), slack, u)
    rules = _choice_rules(exact, idx[tokens]) | _weight_rule(exact, idx[tokens], factors[tokens], config)
    for rule, (bad, got, wanted) in rules.items():
        if bad.any():
            row = int(bad.any(axis=1).argmax())
            values = f"got {got[row].tolist()}, expected {wanted[row].tolist()}, slack {slack[row, 0]:.1e}"
            return f"token {tokens[row]}, experts {idx[tokens[row]].tolist()}: {rule}: {values}"
    return None


@dataclass(frozen=True)
class _Exact:
    """Float64 logits z and scores `[rows, num_experts]` of the checked rows, and how far computed logits may be off."""

    kind: RouterKind
    weights: Weights | None
    z: Array
    scores: Array
    slack: Array
    u: float

    @property
    def ulps(self) -> Array:
        """Roundings of a score, in units in the last place: exp(z - best) has |z - best| of them, a sum sqrt(n)."""
        best = self.z.max(axis=1, keepdims=True)
        falls = best - self.z if self.kind.score in ("softmax", "sparsemixer") else np.zeros_like(self.z)
        ulps: Array = GROWTH * (falls + self.z.shape[1] ** 0.5 + 1)
        return ulps


_Rules = dict[str, tuple[Array, Array, Array]]


def _logit_bound(x: Array, router: Array | Weights, kind: RouterKind) -> Array:
    """`[num_tokens]`: no partial sum of a logit of that token is larger; not finite if x is not."""
    matrix = router.router if isinstance(router, Weights) else router
    with np.errstate(over="ignore", invalid="ignore"):
        sizes = np.linalg.norm(x.astype(np.float64), axis=1)
        bound: Array = sizes * np.linalg.norm(matrix.astype(np.float64), axis=1).max()
        if kind.logit_bias:
            assert isinstance(router, Weights) and router.router_bias is not None
            bound = bound + np.abs(router.router_bias.astype(np.float64)).max()
        return bound * kind.logit_scale


def _choice_rules(exact: _Exact, idx: Array) -> _Rules:
    """Is each chosen expert at least as good as all that were left, and as the next of its row?"""
    if exact.kind.choice == "given":
        return {}
    values, low, high = _choice_intervals(exact)
    num_chosen = idx.shape[1] - exact.kind.num_always
    always = np.arange(values.shape[1], values.shape[1] + exact.kind.num_always)
    chosen = np.minimum(idx[:, :num_chosen], values.shape[1] - 1)
    left_low = low.copy()
    np.put_along_axis(left_low, chosen, -np.inf, axis=1)
    floor = np.broadcast_to(left_low.max(axis=1, keepdims=True), chosen.shape)
    got, most = np.take_along_axis(values, chosen, axis=1), np.take_along_axis(high, chosen, axis=1)
    least = np.take_along_axis(low, chosen, axis=1)
    rising = np.zeros(chosen.shape, bool)
    rising[:, 1:] = least[:, 1:] > most[:, :-1]
    wrong = (idx[:, num_chosen:] != always) if len(always) else np.zeros((len(idx), 0), bool)
    return {
        "the last experts of a token are not those of all tokens": (wrong, idx, np.broadcast_to(always, wrong.shape)),
        "a chosen logit or score is below the k-th best": (most < floor, got, floor),
        "the experts are not in falling order of logits or scores": (rising, got, np.sort(got, axis=1)[:, ::-1]),
    }


def _choice_intervals(exact: _Exact) -> tuple[Array, Array, Array]:
    """What the choice is made on `[rows, experts chosen from]`: exact, the least and the most that may be computed."""
    kind = exact.kind
    values = choice_values(exact.z, exact.scores, kind, exact.weights)
    margin = np.broadcast_to(exact.slack, values.shape)
    if kind.choice == "score":
        scores = exact.scores[:, : values.shape[1]]
        margin = scores * _relative_margin(exact)[:, : values.shape[1]]
    margin = margin + GROWTH * exact.u * np.abs(values)
    low, high = values - margin, values + margin
    if kind.num_groups == 1:
        return values, low, high
    shape = (len(values), kind.num_groups, values.shape[1] // kind.num_groups)
    group_low, group_high = (group_scores(part.reshape(shape), kind) for part in (low, high))
    kth, rivals = kind.num_topk_groups, -np.sort(-group_high, axis=1)
    surely = group_low > (rivals[:, kth : kth + 1] if kth < kind.num_groups else -np.inf)
    never = group_high < -np.sort(-group_low, axis=1)[:, kth - 1 : kth]
    surely, never = (np.repeat(part, values.shape[1] // kind.num_groups, axis=1) for part in (surely, never))
    fill = -np.inf if kind.group_fill == "lowest" else 0.0
    low = np.where(never, fill, np.where(surely, low, np.minimum(low, fill)))
    high = np.where(never, fill, np.where(surely, high, np.maximum(high, fill)))
    return np.where(never, fill, values), low, high


def _relative_margin(exact: _Exact) -> Array:
    """Of scores. Beyond exp(700) anything may come out, and a product with it must not be 0 * inf."""
    margin: Array = np.expm1(np.minimum(2 * exact.slack, 700)) + exact.u * exact.ulps
    return margin


def _weight_rule(exact: _Exact, idx: Array, factors: Array, config: MoEConfig) -> _Rules:
    """Is each weight that of the exact logits, for the experts that were chosen?"""
    expected = weigh(exact.z, exact.scores, idx, exact.kind, exact.weights)
    expected = np.where(idx >= 0, expected, 0)
    relative = np.take_along_axis(_relative_margin(exact), np.maximum(idx, 0), axis=1)
    if exact.kind.renormalize:  # the norm is off as well, by no more than the worst of its scores
        relative = relative + relative.max(axis=1, keepdims=True)
    margin = np.abs(expected) * relative
    low, high = expected - margin, expected + margin
    if exact.kind.score == "sparsemixer":
        low, high = _sparsemixer_interval(exact, idx, expected, margin)
    tiny = float(np.finfo(config.accumulator).tiny)
    bad = ~((factors >= low - tiny) & (factors <= high + tiny))
    return {"a weight is not that expert's": (bad, factors, expected)}


def _sparsemixer_interval(exact: _Exact, idx: Array, expected: Array, margin: Array) -> tuple[Array, Array]:
    """An expert at the edge of the jitter may be in the softmax or not: between a little less jitter and a little more.

    The ratio (m - z) / max(|z|, m) of logits that are off by the slack is off by 4 slack / max(|z|, m) at most.
    """
    with np.errstate(divide="ignore"):
        wide = 2 * exact.slack / np.abs(exact.z) + exact.u
    jitter = exact.kind.jitter
    usual, *ends = (sparsemixer(exact.z, idx, end) for end in (jitter, jitter + wide, jitter - wide))
    ends = [expected * end / usual for end in ends]
    return np.minimum(*ends) - margin, np.maximum(*ends) + margin
