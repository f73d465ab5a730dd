"""How far a correct implementation may be from the float64 oracle, derived from dtypes and reduction lengths.

The bound is statistical: rounding errors are independent, so n of them grow as sqrt(n), not n. It holds for routing
logits of order one to ten, as trained routers give. Leaves out: reduced-precision matrix units such as TF32.

It holds for every arithmetic of CPUs (flashmoe_numba/tile_gemm/arithmetic.py). A sum of n products is rounded n times,
each time by u of what it has come to: with independent terms of size s the squares add up to u^2 s^2 n^2 / 2. `pairs`
rounds as often as `fma`. `tiles` rounds two sums of 16 products, their sum, and that into the sum: for each 32 products
2 (1 + ... + 16) + 32 squares, and (n / 32)^2 / 2 times 32 of the last kind, in all u^2 s^2 (n^2 / 64 + 9.5 n). That is
less from 20 products on, and with fewer, beside a result of s^2 n, it is below the 8^2 of elementwise steps.

`pairs` and `tiles` take denormal numbers for zeros, which adds an absolute error: a product of a denormal element loses
less than 2^-126 times the other factor, and each of at most 2 n roundings that is flushed loses less than 2^-126. So a
sum is off by at most 2^-126 n (2 + max|x| + max|w|) more. With n = 10,000 and elements up to 1,000 that is 2e-31:
`max_rel_error` divides by the largest result, so only layers whose results are all smaller than some 1e-25 see it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arrays import Array
from .config import MoEConfig

# The one constant: a computed sum of n terms is at most GROWTH * u * sqrt(n) away, in units of its size, u being the
# unit roundoff. One deviation of such a random walk is below 0.6 (a rounding is uniform in [-u, u]: 1 / sqrt(3)). The
# largest of a few million normal errors is at 5.5 deviations, while the largest result, which they are divided by, is
# at 4 or more. That leaves a factor of 3 to 5 for sums that cancel.
GROWTH = 4.0

# exp, division and the products of gate, activation and combine: a few units in the last place each.
ELEMENTWISE_ULPS = 8

# Roundings to the element type on the way: hidden activation, expert result, sum over the experts.
ELEMENT_ROUNDINGS = 3


def tolerance(config: MoEConfig, element_roundings: int = ELEMENT_ROUNDINGS) -> float:
    """Bound on `max_rel_error` of a layer that sums in `config.accumulator` and rounds to `config.dtype`.

    The walk of the two matrix products and that of the roundings to the element type are independent, so their
    squares add: `GROWTH * sqrt(u_sum^2 (hidden + ffn + 8^2) + 3 u_element^2)`, of the widest expert.

    Args:
        element_roundings: instead of 3, for an implementation that rounds to the element type more often.
    """
    return walk(config, config.hidden + max(config.ffn, config.shared_ffn), element_roundings)


def walk(config: MoEConfig, num_terms: int, element_roundings: int) -> float:
    """Of sums with that many terms, one behind the other, and roundings to the element type between them."""
    u_sum, u_element = config.format.sums.unit_roundoff, config.format.unit_roundoff
    sums = u_sum**2 * (num_terms + ELEMENTWISE_ULPS**2)
    return float(GROWTH * np.sqrt(sums + element_roundings * u_element**2))


def max_rel_error(y: Array | Sequence[Array], ref: Array | Sequence[Array]) -> float:
    """`max|y - ref| / max|ref|` over the rows that are finite in `ref`; without the division if `ref` is zero there.

    Args:
        y, ref: `[..., hidden]`, or lists of `[num_tokens, hidden]` of the ranks.

    Returns:
        inf if a row is finite in one of the two only; 0 if there are no finite rows.

    Raises:
        ValueError: the shapes differ.
    """
    y_rows, ref_rows = _rows(y), _rows(ref)
    if y_rows.shape != ref_rows.shape:
        raise ValueError(f"y and ref must have the same shape, got {list(y_rows.shape)} and {list(ref_rows.shape)}")
    finite = np.isfinite(ref_rows).all(axis=1)
    if not np.array_equal(finite, np.isfinite(y_rows).all(axis=1)):
        return float("inf")
    scale = np.abs(ref_rows[finite]).max(initial=0.0)
    difference = np.abs(y_rows[finite] - ref_rows[finite]).max(initial=0.0)
    return float(difference / scale if scale > 0 else difference)


def _rows(values: Array | Sequence[Array]) -> Array:
    """`[rows, hidden]` in float64."""
    parts = [values] if isinstance(values, np.ndarray) else list(values)
    return np.concatenate([part.reshape(-1, part.shape[-1]).astype(np.float64) for part in parts])
