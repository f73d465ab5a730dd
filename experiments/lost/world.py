"""A layer, the calls that all ranks make of it, and the results that nobody disturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe_numba import FlashMoE
from reference import MoEConfig, Weights

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Calls go round `tokens`, `[calls][rank] -> [num_tokens, hidden]`; `expected` are the results, likewise."""

    config: MoEConfig
    weights: Weights
    tokens: list[list[Array]]
    expected: list[list[Array]]
    num_calls: int
    num_processors: int
    deadline_s: float


def make_trial(num_ranks: int, num_calls: int, deadline_s: float, num_processors: int = 2) -> Trial:
    """Compiles the kernel, if that was not done, so that forked ranks need not."""
    config = MoEConfig(
        num_ranks=num_ranks, num_tokens=64, hidden=64, ffn=128, num_experts=2 * num_ranks, num_topk=2, gated=True,
        activation="silu", tile_m=16, tile_m_min=4, tile_n=32, token_block=16,
    )  # fmt: skip
    weights, rng = Weights.random(config, seed=num_ranks, bias=True), np.random.default_rng(num_ranks)
    full, ragged = [config.num_tokens] * num_ranks, rng.integers(0, config.num_tokens, num_ranks)
    tokens = [_tokens(config, counts, rng) for counts in (full, ragged, [0] * (num_ranks - 1) + [40], full)]
    with FlashMoE(config, weights, num_processors=num_processors) as layer:
        expected = [layer(parts) for parts in tokens]
    return Trial(
        config=config, weights=weights, tokens=tokens, expected=expected, num_calls=num_calls,
        num_processors=num_processors, deadline_s=deadline_s,
    )  # fmt: skip


def _tokens(config: MoEConfig, counts: Any, rng: np.random.Generator) -> list[Array]:
    return [rng.standard_normal((count, config.hidden)).astype(config.numpy_dtype) for count in counts]
