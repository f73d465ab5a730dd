"""How far each element of a result may be from the float64 oracle, for small layers and rows of any size.

The yardstick of an element is the same layer on absolute values: an element that cancels to almost nothing still has
the rounding errors of its terms. All activations satisfy |act(z)| <= |z|, so identity bounds them. Where `tolerance`
and `max_rel_error` measure a whole result by its largest element, this sees a small row beside a large one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from .arrays import Array
from .config import MoEConfig
from .layer import moe_layer
from .weights import Weights


def absolute_terms(
    x: Sequence[Array],
    weights: Weights,
    config: MoEConfig,
    topk_idx: Sequence[Array],
    topk_weights: Sequence[Array],
) -> list[Array]:
    """`[num_tokens_of_rank, hidden]` of each rank: what errors are measured in. Arguments as `moe_layer`'s lists."""
    sizes = [np.abs(part) for part in x], [np.abs(part) for part in topk_weights]
    terms = moe_layer(sizes[0], absolute(weights), replace(config, activation="identity"), topk_idx, sizes[1])
    return list(terms)


def absolute(weights: Weights) -> Weights:
    """The weights with all signs taken away."""
    arrays = {field.name: getattr(weights, field.name) for field in fields(weights) if field.name != "first_expert"}
    return replace(weights, **{name: np.abs(array) for name, array in arrays.items() if array is not None})


def underflow(config: MoEConfig) -> float:
    """What roundings near zero may add to an element, whatever its terms are.

    One subnormal step of the element type per term of the down projection, and one per result and sum; and of the
    accumulator, where a product underflows, two per term of an up projection, which the down projection sums.
    """
    element, sums = smallest(config.numpy_dtype), smallest(config.accumulator)
    return element * (config.ffn + 2 * config.num_topk) + sums * 2 * config.hidden * config.ffn


def smallest(dtype: np.dtype[Any]) -> float:
    """The smallest positive number, a subnormal one."""
    return float(np.nextafter(dtype.type(0), dtype.type(1)))
