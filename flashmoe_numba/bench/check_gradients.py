"""Are the gradients that a layer computed right? Each element is compared with the float64 oracle, by its own bound.

The oracle runs with the layer's own routing. The gradients of logits, and what follows from them, are those of the
layer's own gradients of the weights that its router made: so each step is judged by what went into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from reference import MoEConfig, Routing, Weights, Workload, gradient_tolerance, moe_layer_backward, router_tolerance
from reference.arrays import Array, overflowed
from reference.router_gradients import router_backward
from reference.routers import exact_logits
from reference.tolerance import walk
from reference.weights import EXPERT_ARRAYS, SHARED_ARRAYS

from .backward import RankGradients


@dataclass(frozen=True)
class GradientVerdict:
    """How far each gradient is off at its worst element, as a share of what that may be; above 1 it is wrong."""

    shares: dict[str, float]

    @property
    def failures(self) -> list[str]:
        """A sentence for each gradient that is wrong."""
        rule = "may be off by at most its bound (reference/gradient_bounds.py), and is by"
        return [f"the gradient of {name} {rule} {share:.3g} of it" for name, share in self.shares.items() if share > 1]


def check_gradients(
    config: MoEConfig,
    weights: Weights,
    workload: Workload,
    routing: Sequence[Routing],
    dy: Sequence[np.ndarray],
    found: Sequence[RankGradients],
    tf32: bool = False,
) -> GradientVerdict:
    """Judge one backward.

    Args:
        weights: all experts.
        workload: all ranks' tokens, and the routing if it came from outside.
        routing: that of the layer, one per rank.
        dy: gradients of the results, one per rank.
        found: gradients, one per rank.
        tf32: were experts' float32 products made as TF32? Bounds are then those of float16, whose mantissa is as long.

    Raises:
        ValueError: the routing is none.
    """
    chosen = [part.topk_idx for part in routing], [part.topk_weights for part in routing]
    exact = moe_layer_backward(workload.x, list(dy), weights, config, *chosen)
    judged_as = replace(config, dtype="float16") if tf32 else config
    bound = gradient_tolerance(workload.x, dy, _in_type_of(judged_as, weights), judged_as, *chosen)
    pairs = {name: (array, getattr(bound.weights, name)) for name, array in _arrays(exact.weights).items()}
    shares: dict[str, list[float]] = {name: [] for name in ("x", "topk_weights", "logits")}
    element, sums = config.numpy_dtype, config.accumulator
    for rank, (x, own) in enumerate(zip(workload.x, found, strict=True)):
        d_x, limit = exact.x[rank], bound.x[rank]
        if workload.topk_weights is None:
            routers = _Router(x, routing[rank].topk_idx, own.topk_weights.astype(np.float64), weights, judged_as)
            d_x, limit = d_x + routers.d_x, limit + routers.x_bound
            pairs |= {name: routers.added_to(name, *pairs[name]) for name in routers.arrays.keys() & pairs.keys()}
            assert own.logits is not None, "the router made them"
            shares["logits"].append(_share(own.logits, routers.d_logits, routers.bound.logits, sums))
        shares["x"].append(_share(own.x, d_x, limit, element))
        given = exact.topk_weights[rank], bound.topk_weights[rank]
        shares["topk_weights"].append(_share(own.topk_weights, *given, sums))
    for name, pair in pairs.items():
        if name != "selection_bias":  # has no gradient
            shares[name] = [_share(_of_all_ranks(name, found), *pair, sums)]
    return GradientVerdict({name: max(of_ranks) for name, of_ranks in shares.items() if of_ranks})


class _Router:
    """What one rank's gradients of the weights of its pairs come to, by way of the router, and how far that may be off.

    Args:
        d_weights: `[num_tokens, num_topk]`, the layer's.
    """

    def __init__(self, x: Array, topk_idx: Array, d_weights: Array, weights: Weights, config: MoEConfig) -> None:
        self.d_logits, arrays = router_backward(exact_logits(x, weights), topk_idx, d_weights, weights, config)
        self.bound = router_tolerance(x, topk_idx, d_weights, weights, config)
        with np.errstate(invalid="ignore", over="ignore"):
            self.d_x = self.d_logits @ weights.router.astype(np.float64)
            self.arrays = arrays | {"router": self.d_logits.T @ x.astype(np.float64)}
        # x's own gradient is added to this, and the sum is rounded
        self.x_bound = self.bound.x + walk(config, config.num_topk, 1) * np.abs(self.d_x)

    def added_to(self, name: str, exact: Array, bound: Array) -> tuple[Array, Array]:
        with np.errstate(invalid="ignore"):
            return exact + self.arrays[name], bound + self.bound.arrays[name]


def _in_type_of(config: MoEConfig, weights: Weights) -> Weights:
    """Experts' arrays as this config has them; sizes of sums do not show what that rounds."""
    given = {name: getattr(weights, name) for name in (*EXPERT_ARRAYS, *SHARED_ARRAYS)}
    cast = {name: array.astype(config.numpy_dtype, copy=False) for name, array in given.items() if array is not None}
    return replace(weights, **cast)


def _of_all_ranks(name: str, found: Sequence[RankGradients]) -> Array:
    """Experts' one after the other; those that all ranks have by way of their own tokens, added up."""
    parts = [getattr(of_rank.weights, name).astype(np.float64) for of_rank in found]
    with np.errstate(invalid="ignore"):
        return np.concatenate(parts) if name in EXPERT_ARRAYS else np.sum(parts, axis=0)


def _arrays(weights: Weights) -> dict[str, Array]:
    found = {each.name: getattr(weights, each.name) for each in fields(weights)}
    return {name: array for name, array in found.items() if isinstance(array, np.ndarray)}


def _share(got: Array, exact: Array, bound: Array, dtype: np.dtype) -> float:
    """The largest error as a share of its bound; infinite, where another element is finite than should be."""
    exact = overflowed(exact, dtype)
    finite = np.isfinite(exact)
    if got.shape != exact.shape or not np.array_equal(np.isfinite(got), finite):
        return float("inf")
    finite &= np.isfinite(bound)
    errors, bounds = np.abs(got.astype(np.float64) - exact)[finite], bound[finite]
    with np.errstate(divide="ignore"):
        return float((errors[errors > 0] / bounds[errors > 0]).max(initial=0.0))
