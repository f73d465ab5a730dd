"""How far each element of a result may be from the float64 oracle, for small layers and rows of any size.

The yardstick of an element is the same layer on absolute values: an element that cancels to almost nothing still has
the rounding errors of its terms. All activations but relu2 satisfy |act(z)| <= |z|, so identity bounds them. Where
`tolerance` and `max_rel_error` measure a whole result by its largest element, this sees a small row beside a large one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from .arrays import Array
from .config import MoEConfig
from .layer import moe_layer
from .layer_kinds import ExpertKind
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
    kinds: dict[str, Any] = {name: _absolute_kind(getattr(config, name)) for name in ("expert", "shared_expert")}
    plain = replace(config, activation=_at_least(config.activation), **kinds)
    return list(moe_layer(sizes[0], absolute(weights), plain, topk_idx, sizes[1]))


def _at_least(activation: str) -> str:
    """One that on numbers that are not negative gives no less than this one does of any sign."""
    return activation if activation == "relu2" else "identity"


def _absolute_kind(kind: ExpertKind | None) -> ExpertKind | None:
    """A kind whose results, on absolute values, none of this one are larger than."""
    if kind is None:
        return None
    activation = _at_least(kind.activation)
    slope = kind.slope if activation == "relu2" else 1.0  # that is not homogeneous of degree 1
    return ExpertKind(activation=activation, gated=kind.gated, up_offset=abs(kind.up_offset), slope=slope)


def absolute(weights: Weights) -> Weights:
    """The weights with all signs taken away."""
    arrays = {field.name: getattr(weights, field.name) for field in fields(weights)}
    sizes: dict[str, Any] = {name: np.abs(array) for name, array in arrays.items() if isinstance(array, np.ndarray)}
    return replace(weights, **sizes)


def underflow(config: MoEConfig) -> float:
    """What roundings near zero may add to an element, whatever its terms are.

    One subnormal step of the element type per term of the down projection, and one per result and sum; and of the
    accumulator, where a product underflows, two per term of an up projection, which the down projection sums.
    """
    element, sums = smallest(config.numpy_dtype), smallest(config.accumulator)
    inner = config.ffn + config.shared_ffn
    results = config.num_topk + (config.shared_ffn > 0)
    return element * (inner + 2 * results) + sums * 2 * config.hidden * inner


def smallest(dtype: np.dtype[Any]) -> float:
    """The smallest positive number, a subnormal one."""
    return float(np.nextafter(dtype.type(0), dtype.type(1)))
