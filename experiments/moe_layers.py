"""Layers for `flashmoe check`: this project's, a loop in NumPy, and transformers' experts of Mixtral in three ways.

    flashmoe check experiments/moe_layers.py:flashmoe
    flashmoe check experiments/moe_layers.py:mixtral_eager --torch

docs/check.md says what is found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashmoe_numba import FlashMoE
from reference import MoEConfig, Weights

MOST_TOKENS = 64


def flashmoe(weights: Weights) -> Callable[..., np.ndarray]:
    """One rank; the number of choices is known when the first call comes."""
    made: list[FlashMoE] = []
    num_experts, ffn, hidden = weights.up_proj.shape
    sizes = dict(num_ranks=1, num_tokens=MOST_TOKENS, num_experts=num_experts, ffn=ffn, hidden=hidden)

    def layer(x: np.ndarray, topk_idx: np.ndarray, topk_weights: np.ndarray) -> np.ndarray:
        if not made:
            kind: dict[str, Any] = dict(gated=weights.gate_proj is not None, activation="silu", dtype=x.dtype)
            config = MoEConfig(num_topk=topk_idx.shape[1], **sizes, **kind)
            made.append(FlashMoE(config, weights))
        (y,) = made[0]([x], topk_idx=[topk_idx], topk_weights=[topk_weights])
        return y

    return layer


def loop(x: np.ndarray, topk_idx: np.ndarray, topk_weights: np.ndarray, weights: Weights) -> np.ndarray:
    """An expert after the other, each with all of its rows."""
    y = np.zeros_like(x)
    for expert in range(len(weights.up_proj)):
        rows, choices = np.nonzero(topk_idx == expert)
        gate, up = x[rows] @ weights.gate_proj[expert].T, x[rows] @ weights.up_proj[expert].T
        result = (gate / (1 + np.exp(-gate)) * up) @ weights.down_proj[expert].T
        y[rows] += topk_weights[rows, choices, None] * result
    return y


def mixtral_eager(weights: Any) -> Any:
    return _mixtral(weights, "eager")


def mixtral_grouped(weights: Any) -> Any:
    return _mixtral(weights, "grouped_mm")


def mixtral_batched(weights: Any) -> Any:
    return _mixtral(weights, "batched_mm")


def _mixtral(weights: Any, implementation: str) -> Any:
    """The module, with these weights."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    num_experts, ffn, hidden = weights.up_proj.shape
    config = MixtralConfig(hidden_size=hidden, intermediate_size=ffn, num_local_experts=num_experts)
    config._experts_implementation = implementation
    experts = MixtralExperts(config).to(weights.up_proj.dtype)
    with torch.no_grad():
        experts.gate_up_proj.copy_(torch.cat([weights.gate_proj, weights.up_proj], dim=1))
        experts.down_proj.copy_(weights.down_proj)
    return experts
