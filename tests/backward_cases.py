"""What tests of the backward share: calls that are kept and run backwards, and the comparison with the reference."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from cases import random_tokens

from flashmoe_numba import FlashMoE
from reference.backward import moe_layer_backward
from reference.gradient_bounds import gradient_tolerance
from reference.router_bounds import router_tolerance
from reference.router_gradients import router_backward
from reference.routers import exact_logits

RELATIVE = 2e-12  # of float64, beside the largest number of an array: sums of some hundred terms of mixed signs
REPLICATED = ("router", "router_bias", "expert_scale", "selection_bias", "result_scale")


class Call(NamedTuple):
    """One call: what went into its backward, the routing that the kernel had, and what came out."""

    dy: list[np.ndarray]
    said: list[np.ndarray] | None
    routings: list[Any]
    gradients: Any


def arrays_of(weights):
    """The arrays that there are, by name."""
    return {name: array for name, array in vars(weights).items() if isinstance(array, np.ndarray)}


def is_replicated(name):
    """Does every rank have this array, by way of its own tokens?"""
    return name in REPLICATED or name.startswith("shared_")


def gradients_of(world, save, data_seed, accumulate=False, outside=False, make=FlashMoE, **settings):
    """(Call, (x, what was given)) of each call of a world; all are kept before any has its backward.

    Args:
        outside: every routing is given, the router's own too, once it is known.
    """
    draw = np.random.default_rng(data_seed)
    calls, kept, sums = list(world.calls()), [], None
    with make(world.config, world.weights, num_processors=world.num_processors, save=save, **settings) as layer:
        for i, (x, given) in enumerate(calls):
            if outside:
                layer(x, **given)
                idx, factors = zip(*((r.topk_idx, r.topk_weights) for r in layer.routing), strict=True)
                given = {"topk_idx": list(idx), "topk_weights": list(factors)}
                calls[i] = x, given
            _, saved = layer.forward(x, **given)
            kept.append((saved, layer.routing))
        for i in draw.permutation(len(calls)).tolist():
            (x, given), (saved, routings) = calls[i], kept[i]
            dy = random_tokens(world.config, [len(part) for part in x], data_seed + i)
            said = None
            if "topk_weights" not in given and draw.random() < 0.5:
                said = [draw.standard_normal((len(part), world.config.num_choices)) for part in x]
            found = layer.backward(saved, dy, logits_gradient=said, into=sums if accumulate else None)
            sums = found
            yield Call(dy, said, routings, found), (x, given)


def assert_gradients_equal(call, x, weights, config, given):
    """In float64, with the kernel's routing, which must be the reference's."""
    case = f"{config}, counts {[len(part) for part in x]}"
    outside = given if "topk_weights" in given or "topk_idx" in given else {}
    right = moe_layer_backward(x, call.dy, weights, config, logits_gradient=call.said, **outside)
    of_terms = bounds_of_terms(call, x, weights, config)
    if right.logits is None:
        assert all(found is None for found in call.gradients.logits)
    else:
        add_bounds_of_router(of_terms, call, x, weights, config)
    for name in ("x", "topk_weights", "logits"):
        if getattr(right, name) is not None:
            for rank in range(config.num_ranks):
                found, wanted, most = (getattr(g, name)[rank] for g in (call.gradients, right, of_terms))
                assert_close(f"{case}: {name}[{rank}]", found, wanted, most)
    assert_weights_equal(case, call.gradients.weights, right.weights, config, of_terms.weights)


def bounds_of_terms(call, x, weights, config):
    """How far gradients may be off that are much smaller than their terms: those of experts, and what follows them.

    With one hidden column, say, an expert's result has one direction, of which a norm leaves next to nothing.
    """
    idx, factors = [r.topk_idx for r in call.routings], [r.topk_weights for r in call.routings]
    return replace(gradient_tolerance(x, call.dy, weights, config, idx, factors), logits=[])


def add_bounds_of_router(bounds, call, x, weights, config):
    """What the router's gradients may be off by, on their own and with those of the weights that it made."""
    for rank, (tokens, routing) in enumerate(zip(x, call.routings, strict=True)):
        own = router_tolerance(tokens, routing.topk_idx, call.gradients.topk_weights[rank], weights, config)
        exact, logits, scales = exact_logits(tokens, weights), np.zeros(own.logits.shape), np.zeros(config.num_choices)
        for choice in range(config.num_topk):
            off = np.where(np.arange(config.num_topk) == choice, bounds.topk_weights[rank], 0.0)
            d_logits, arrays = router_backward(exact, routing.topk_idx, off, weights, config)
            logits, scales = logits + np.abs(d_logits), scales + np.abs(arrays["expert_scale"])
        bounds.logits.append(own.logits + logits)
        bounds.x[rank] += own.x + logits @ np.abs(weights.router)
        arrays = dict(router=logits.T @ np.abs(tokens), router_bias=logits.sum(axis=0), expert_scale=scales)
        for name, bound in arrays.items():
            if getattr(bounds.weights, name) is not None:
                getattr(bounds.weights, name)[...] += own.arrays[name] + bound


def assert_weights_equal(case, of_ranks, right, config, of_terms=None):
    """Each rank's of its own experts; those of router and shared expert add up over the ranks."""
    most = arrays_of(of_terms) if of_terms else {}
    wanted, found = arrays_of(right), [arrays_of(of_rank) for of_rank in of_ranks]
    assert {*found[0]} | {"selection_bias"} >= {*wanted}, f"{case}: {sorted(wanted)}, got {sorted(found[0])}"
    here = config.num_experts_per_rank
    for name in found[0]:
        if is_replicated(name):
            assert_close(f"{case}: {name}", sum(arrays[name] for arrays in found), wanted[name], most.get(name, 0.0))
        else:
            of_all = np.concatenate([arrays[name] for arrays in found])
            assert_close(f"{case}: {name}", of_all, wanted[name], most.get(name, 0.0))
            assert all(len(arrays[name]) == here for arrays in found)


def assert_within_bounds(call, x, weights, config):
    """In any type, each element by the bound of `gradient_tolerance`, for the routing that was given."""
    idx, factors = [r.topk_idx for r in call.routings], [r.topk_weights for r in call.routings]
    right = moe_layer_backward(x, call.dy, weights, config, idx, factors)
    bound = gradient_tolerance(x, call.dy, weights, config, idx, factors)
    found = call.gradients
    for rank in range(config.num_ranks):
        for name in ("x", "topk_weights"):
            parts = (getattr(gradients, name)[rank] for gradients in (found, right, bound))
            assert_within(f"{config}: {name}[{rank}]", *parts)
    arrays = [arrays_of(of_rank) for of_rank in found.weights]
    wanted, most = arrays_of(right.weights), arrays_of(bound.weights)
    for name in arrays[0]:
        join = sum if is_replicated(name) else np.concatenate
        assert_within(f"{config}: {name}", join([a[name].astype(np.float64) for a in arrays]), wanted[name], most[name])


def assert_within(case, got, wanted, bound):
    with np.errstate(invalid="ignore"):
        error = np.abs(got.astype(np.float64) - wanted)
    if not (error <= bound).all():
        at = np.unravel_index(np.argmax(error - bound), error.shape)
        raise AssertionError(f"{case}: {got[at]!r} at {at}, wanted {wanted[at]!r} +- {bound[at]:.1e}")


def assert_close(case, got, wanted, of_terms=0.0):
    assert got.shape == wanted.shape, f"{case}: {got.shape}, wanted {wanted.shape}"
    error, bound = np.abs(got - wanted), RELATIVE * np.abs(wanted).max(initial=0) + of_terms
    if not (error <= bound).all():
        at = np.unravel_index(np.argmax(error - bound), error.shape)
        most = np.broadcast_to(bound, error.shape)[at]
        raise AssertionError(f"{case}: {got[at]!r} at {at}, wanted {wanted[at]!r} +- {most:.1e}")
