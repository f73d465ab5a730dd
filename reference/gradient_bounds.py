"""How far each element of a gradient may be from the float64 one, for a backward that rounds as kernels do.

It sums in the accumulator's type and rounds to the element type: dy, the products with the up matrices that the forward
keeps, w A, dh and dx of `expert_gradients`, and a token's sum of dx. Gradients of weights and of their arrays stay in
the accumulator's type.

As in `tolerance`, errors are independent, so their squares add. The square of a sum's size is the sum of its terms'
squares, which is how far partial sums of terms of random signs come, and its own, which is how far those of terms of
one sign come. A bound is `tolerance.walk` times the size: of the lengths of all sums behind the element, and of the
roundings to the element type on the way. With one deviation below 0.6 roundings a bound is at 6 deviations or more.

A slope is off because its product is, by a walk times the product's size: what it changes by from the product to an end
of that interval, divided by that walk, is added to the slope's size. Where relu or a bound bends within the interval,
it is all of it. Below normal numbers a rounding is as large as at the smallest of these, which is added to what is
rounded.

Where results go through a norm, what an expert gets in the place of dy has a size as any sum has, with a part for how
far it is off because the result is.

Leaves out: the router, whose gradients follow from those of the weights (`router_bounds`); sums whose terms are sorted
by sign and cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from .activations import sigmoid, sigmoid_slope
from .arrays import Array
from .backward import Gradients, Source, add_arrays, moe_layer_backward, zeros
from .config import MoEConfig
from .error_bounds import smallest
from .expert_gradients import ExpertGradients, slopes
from .experts import activate, linear
from .formats import FORMATS
from .layer import expert_input, source_routings, sources
from .layer_kinds import ExpertKind
from .tolerance import walk
from .weights import Weights


def gradient_tolerance(
    x: Sequence[Array],
    dy: Sequence[Array],
    weights: Weights,
    config: MoEConfig,
    topk_idx: Sequence[Array],
    topk_weights: Sequence[Array],
) -> Gradients:
    """The most that each element of a gradient with this routing may be off, in the form of `moe_layer_backward`'s.

    Where a gradient is not finite its bound need not be. Of what has no gradient, such as a dropped pair, it is 0.

    Args:
        x, dy, topk_idx, topk_weights: lists by rank, as `moe_layer_backward` has them.

    Raises:
        TypeError, ValueError: as there.
    """
    exact = moe_layer_backward(list(x), list(dy), weights, config, list(topk_idx), list(topk_weights))
    tokens = sources(list(x), config)
    routings = source_routings(tokens, weights, config, list(topk_idx), list(topk_weights))
    parts = [Source(*given, config) for given in zip(tokens, dy, routings, strict=True)]
    squares, walks = zeros(weights), _walks(config, sum(len(part) for part in tokens))
    with np.errstate(invalid="ignore", over="ignore"):
        for part in parts:
            _add_pairs(part, weights, config, squares)
            if config.shared_ffn:
                _add_shared(part, weights, config, squares)
        sizes = {name: np.sqrt(square + getattr(exact.weights, name) ** 2) for name, square in squares.items()}
        arrays = {name: walks[name.removeprefix("shared_")] * size for name, size in sizes.items()}
        dx = [np.sqrt(part.dx + value**2) for part, value in zip(parts, exact.x, strict=True)]
        factors = [np.sqrt(p.d_factors + value**2) for p, value in zip(parts, exact.topk_weights, strict=True)]
    bounds = [walks["x"] * (size + least(config.numpy_dtype)) for size in dx]
    return Gradients(bounds, [walks["topk_weights"] * size for size in factors], None, replace(weights, **arrays))


def _walks(config: MoEConfig, num_rows: int) -> dict[str, float]:
    """Of each gradient: the terms of the sums behind it, and the roundings to the element type."""
    hidden, ffn = config.hidden, max(config.ffn, config.shared_ffn)
    on_input = int(config.router_kind.weight_input)  # rows times their weights are rounded
    # what is sent in the place of dy, by way of z, a result, its norm and dot: hidden row, result, itself
    normed, rounded = (3 * hidden + ffn, 3) if config.expert_kind.norm_eps is not None else (0, 0)
    # by way of z, dA and dx: z, dy, dh and dx
    row = 2 * hidden + config.expert_kind.num_ups * ffn + normed, 4 + on_input + rounded
    up, down = ((terms + num_rows + normed, 3 + on_input + rounded) for terms in (2 * hidden, hidden))
    factor = (row[0] + hidden, row[1]) if on_input else (2 * hidden + ffn + normed, 2 + rounded)
    found = dict.fromkeys(("up_proj", "gate_proj", "up_bias", "gate_bias"), up)
    found |= {"down_proj": down, "down_bias": (num_rows + normed, 1 + rounded)}
    found |= {"gate_weight": (3 * hidden + ffn + num_rows, 2), "result_scale": (num_rows + normed, on_input + rounded)}
    found |= {"x": (row[0], row[1] + 1), "topk_weights": factor}
    untouched = ("router", "router_bias", "selection_bias", "expert_scale")
    return {name: walk(config, *steps) for name, steps in found.items()} | dict.fromkeys(untouched, 0.0)


def least(dtype: np.dtype[Any]) -> float:
    """The smallest normal number."""
    return smallest(dtype) / FORMATS[dtype.name].unit_roundoff / 2


def _add_pairs(part: Source, weights: Weights, config: MoEConfig, squares: dict[str, Any]) -> None:
    """The squares of what the choices of a source add to each gradient, as `moe_layer_backward` adds them."""
    on_input, x = config.router_kind.weight_input, part.x.astype(np.float64)
    for expert, pairs, rows, factors in part.experts(config):
        given, outside = expert_input(part.x[rows], factors, config), np.ones_like(factors) if on_input else factors
        found = expert_squares(given, part.dy[rows], outside, weights, expert, config, config.expert_kind)
        add_arrays(squares, found.arrays, expert)
        part.d_factors.ravel()[pairs] = (found.x * x[rows] ** 2).sum(axis=1) if on_input else found.factors
        part.dx[rows] += factors**2 * found.x if on_input else found.x
    rows, places = part.identities(config)
    part.d_factors[rows, places] = ((part.dy * x) ** 2).sum(axis=1)[rows]
    np.add.at(part.dx, rows, (part.factors[rows, places][:, None] * part.dy[rows]) ** 2)


def _add_shared(part: Source, weights: Weights, config: MoEConfig, squares: dict[str, Any]) -> None:
    """The squares of what the shared expert adds."""
    assert weights.shared is not None, "the config has a shared expert"
    gate, factors, rise = weights.shared_gate_weight, np.ones((len(part.x), 1)), np.zeros((len(part.x), 1))
    if gate is not None:
        logits, sizes = sized(part.x, gate[None, None], None, 0)
        both = lambda z: [sigmoid(*z), sigmoid_slope(*z)]  # noqa: E731
        factors, rise = _sizes_of(both, [logits], [sizes], walk(config, config.hidden, 0))
        rise = np.hypot(rise, factors)  # of the factor, less its square
    found = expert_squares(part.x, part.dy, factors, weights.shared, 0, config, config.shared_kind)
    part.dx += found.x
    arrays = found.arrays
    if gate is not None:
        d_logits = found.factors * rise[:, 0] ** 2
        part.dx += np.outer(d_logits, gate.astype(np.float64) ** 2)
        arrays = arrays | {"gate_weight": d_logits @ part.x.astype(np.float64) ** 2}
    add_arrays(squares, {f"shared_{name}": array for name, array in arrays.items()})


def expert_squares(
    x: Array, dy: Array, factors: Array, weights: Weights, expert_position: int, config: MoEConfig, kind: ExpertKind
) -> ExpertGradients:
    """The squares of the sizes of all that `expert_backward` adds up or returns, of the same arguments."""
    tiny, step = least(config.numpy_dtype), walk(config, config.hidden, 1 + config.router_kind.weight_input)
    place, square, weighed = expert_position, x.astype(np.float64) ** 2, np.abs(factors)
    ups, sizes = zip(*(sized(x, *up, place) for up in weights.ups), strict=True)
    sizes = tuple(size + tiny for size in sizes)
    (hidden,) = _sizes_of(lambda z: [activate(z, kind)], ups, sizes, step)
    down, bias, arrays = weights.down_proj[place].astype(np.float64), weights.down_bias, {}
    d_result, d_results, d_factors = dy, dy**2, None
    if kind.norm_eps is not None:
        result = linear(activate(ups, kind), weights.down_proj, bias, place)
        normed = _normed(dy, result, np.sqrt(hidden**2 @ down.T**2 + result**2) + tiny, weights, kind)
        d_result, d_results, d_factors = normed.d_result, normed.squares + tiny**2, normed.d_factors
        arrays["result_scale"] = (factors**2 * normed.d_scale).sum(axis=0)
    d_hidden = d_result @ down
    d_sizes = np.sqrt(d_results @ down**2 + d_hidden**2) + least(config.accumulator)
    if d_factors is None:
        d_factors = (d_sizes**2 * hidden**2).sum(axis=1) + (d_hidden * activate(ups, kind)).sum(axis=1) ** 2
        d_factors += 0 if bias is None else dy**2 @ bias[place].astype(np.float64) ** 2
    arrays |= {"down_proj": d_results.T @ (weighed * hidden + tiny) ** 2}
    arrays |= {"down_bias": (factors**2 * d_results).sum(axis=0)}
    dx, squares = np.zeros(x.shape), np.full(x.shape, tiny**2)
    names, rises = ("gate", "up") if kind.gated else ("up",), _sizes_of(lambda z: slopes(z, kind), ups, sizes, step)
    for name, (matrices, _), slope, rise in zip(names, weights.ups, slopes(ups, kind), rises, strict=True):
        matrix, d_up = matrices[place].astype(np.float64), (weighed * d_sizes * rise + tiny) ** 2
        dx += (factors * d_hidden * slope) @ matrix
        squares += d_up @ matrix**2
        arrays |= {f"{name}_proj": d_up.T @ square, f"{name}_bias": d_up.sum(axis=0)}
    return ExpertGradients(squares + dx**2, d_factors, arrays)


class _Normed(NamedTuple):
    """Of gradients through `normalize` of some rows: what an expert gets for dy, and squares of sizes."""

    d_result: Array
    squares: Array  # of d_result
    d_factors: Array  # `[rows]`
    d_scale: Array  # of what each row adds to the gradient of result_scale


def _normed(dy: Array, result: Array, sizes: Array, weights: Weights, kind: ExpertKind) -> _Normed:
    """With v = scale * result, n = v / root and m = mean(dy n), the gradient of v is d = (dy - n m) / root.

    An error s of v changes d by ((3 n m - dy) mean(n s) - m s - n mean(dy s)) / root^2, taken as three terms.
    """
    assert weights.result_scale is not None and kind.norm_eps is not None
    scale = weights.result_scale.astype(np.float64)
    value, off = scale * result, (scale * sizes) ** 2
    root = np.sqrt((value**2).mean(axis=1, keepdims=True) + kind.norm_eps)
    n, columns = value / root, result.shape[1]
    terms = dy * n
    mean = terms.mean(axis=1, keepdims=True)
    d = (dy - n * mean) / root
    spread = [(part * off).sum(axis=1, keepdims=True) / columns**2 for part in (n**2, dy**2)]
    moved = (3 * n * mean - dy) ** 2 * spread[0] + mean**2 * off + n**2 * spread[1]
    summed = dy**2 + (n * mean) ** 2 + n**2 * (terms**2).sum(axis=1, keepdims=True) / columns**2
    squares = d**2 + summed / root**2 + moved / root**4
    factors = (terms**2).sum(axis=1) + terms.sum(axis=1) ** 2 + (d**2 * off).sum(axis=1)
    return _Normed(scale * d, scale**2 * squares, factors, squares * result**2 + (d * sizes) ** 2)


def sized(x: Array, matrices: Array, biases: Array | None, place: int) -> tuple[Array, Array]:
    """`linear`, and the size of each of its sums."""
    values = linear(x, matrices, biases, place)
    squares = x.astype(np.float64) ** 2 @ matrices[place].astype(np.float64).T ** 2
    return values, np.sqrt(squares + values**2)


def _sizes_of(
    function: Callable[[Sequence[Array]], list[Array]], numbers: Sequence[Array], sizes: Sequence[Array], step: float
) -> list[Array]:
    """Of each value of a function of some numbers, each of which may be off by `step` times its size."""
    values = function(numbers)
    found = [np.abs(value) for value in values]
    for i, size in enumerate(sizes):
        ends = [function([*numbers[:i], numbers[i] + sign * step * size, *numbers[i + 1 :]]) for sign in (1, -1)]
        for total, value, *others in zip(found, values, *ends, strict=True):
            total += np.maximum(*(np.abs(other - value) for other in others)) / step
    return found
