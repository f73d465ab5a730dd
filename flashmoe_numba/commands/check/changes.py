"""What properties change of ordinary inputs: routings that are rare, and values at the ends of what types hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from reference.arrays import Array
from reference.error_bounds import absolute, smallest
from reference.experts import activate, linear

from .inputs import Inputs

CHANGE_STREAM = 3


def to_the_same_experts(inputs: Inputs, _: np.random.Generator) -> Inputs:
    return replace(inputs, topk_idx=np.repeat(inputs.topk_idx[:1], len(inputs.x), axis=0))


def with_padding(inputs: Inputs, rng: np.random.Generator) -> Inputs:
    """A third of the choices are none; they keep their weights."""
    kind = rng.integers(6, size=inputs.topk_idx.shape)
    return replace(inputs, topk_idx=np.select([kind == 0, kind == 1], [-1, inputs.config.num_experts], inputs.topk_idx))


def with_zero_weights(inputs: Inputs, rng: np.random.Generator) -> Inputs:
    """Half of the weights are 0, and so those of whole tokens."""
    kept = rng.random(inputs.topk_weights.shape) < 0.5
    return replace(inputs, topk_weights=np.where(kept, inputs.topk_weights, 0).astype(inputs.topk_weights.dtype))


def with_nonfinite_rows(inputs: Inputs, rng: np.random.Generator) -> Inputs:
    """One element of the first row, the last or any in between, and of another third of the rows but one."""
    x, num_tokens = inputs.x.copy(), len(inputs.x)
    rows = rng.permutation(num_tokens)[: 1 + (num_tokens - 1) // 3]
    x[rows, rng.integers(inputs.config.hidden, size=len(rows))] = rng.choice(
        [np.nan, np.nan, np.inf, -np.inf], len(rows)
    )
    return replace(inputs, x=x)


def with_large_rows(inputs: Inputs, rng: np.random.Generator) -> Inputs:
    """Rows of all sizes from ordinary ones to those whose largest sum is an eighth of what the type can hold.

    Half of them are at the end: it is there that something overflows.
    """
    config = inputs.config
    most = float(np.nextafter(config.numpy_dtype.type(np.inf), config.numpy_dtype.type(0)))
    room = np.log2(most / 8 / config.num_topk / _largest_sums(inputs))
    ends = np.floor(np.maximum(0, room / _degree(inputs)))
    return inputs.scaled(2 ** np.minimum(ends, np.floor(rng.uniform(0, 2 * ends + 1))))


def with_tiny_rows(inputs: Inputs, rng: np.random.Generator) -> Inputs:
    """Rows with terms somewhat larger than the smallest normal number, so that many of the results are subnormal."""
    config = inputs.config
    normal = np.log2(smallest(config.numpy_dtype)) + config.format.fraction_bits
    wanted = normal + rng.uniform(2, 10, len(inputs.x))
    sizes = np.maximum(inputs.terms.max(axis=1, initial=0), 1e-9)
    return inputs.scaled(2 ** ((wanted - np.log2(sizes)) / _degree(inputs)))


def _degree(inputs: Inputs) -> int:
    """A row `s` times as large has results `s**degree` times as large."""
    return inputs.config.expert_kind.num_ups


def _largest_sums(inputs: Inputs) -> Array:
    """`[num_tokens]`: no sum or product on the way of a row is larger, in whatever order it is made."""
    x, weights = np.abs(inputs.x), absolute(inputs.weights)
    linear_kind = replace(inputs.config.expert_kind, activation="identity")
    largest = np.full(len(x), 1.0)
    for expert in range(inputs.config.num_experts):
        ups = [linear(x, *up, expert) for up in weights.ups]
        hidden = activate(ups, linear_kind)
        for sums in (*ups, hidden, linear(hidden, weights.down_proj, weights.down_bias, expert)):
            largest = np.maximum(largest, sums.max(axis=1, initial=0))
    return largest
