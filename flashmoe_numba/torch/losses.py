"""Losses of a router that a training adds to its own, of logits and choices as `MoE` and transformers show them."""

from __future__ import annotations

import math

import torch

from reference import MoEConfig
from reference.scalars import check_name, number

SCORES = ("softmax", "sigmoid")


def check_losses(config: MoEConfig, train: bool, load_balancing: float, router_z: float) -> None:
    """Nothing, if a layer of this config has these losses.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    if not train:
        raise ValueError("return_aux must be False without train=True: nothing would follow the loss; got True")
    for name, value in (("load_balancing", load_balancing), ("router_z", router_z)):
        if not 0 <= number(name, value) < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    if config.router_kind.score not in SCORES:
        rule = f"return_aux must be False for a router whose score is none of {', '.join(SCORES)}"
        raise ValueError(f"{rule}; got {config.router_kind.score!r}")


def load_balancing_loss(logits: torch.Tensor, choices: torch.Tensor, score: str = "softmax") -> torch.Tensor:
    """The loss of the Switch Transformer (Fedus et al., 2021, equations 4 to 6), for any number of choices per token.

    `n * sum of f[e] * P[e]` over the n choices that there are: f is the part of the tokens that chose e, which has no
    gradient, P the mean of the tokens' scores. Choices that are all equally frequent give num_topk. transformers'
    `load_balancing_loss_func` computes the same, of all layers at once.

    Args:
        logits: `[num_tokens, n]`.
        choices: integers `[num_tokens, num_topk]`, -1 for none.
        score: "softmax", or "sigmoid", whose scores are divided by their sum, as DeepSeek-V3 does.

    Returns:
        One number, in the logits' type, of sums in float32 at least; 0 without tokens.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    check_name("score", score, SCORES)
    kind, logits = logits.dtype, _rows_of(logits)
    num_tokens, n = logits.shape
    if choices.dim() != 2 or len(choices) != num_tokens:
        rule = f"choices must have shape [{num_tokens}, num_topk], a row for each of logits"
        raise ValueError(f"{rule}; got {list(choices.shape)}")
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    if score != "softmax":
        scores = scores / scores.sum(-1, keepdim=True)
    flat = choices.reshape(-1) + 1  # those of -1 are counted apart
    counts = torch.zeros(n + 1, dtype=logits.dtype, device=logits.device)
    counts = counts.index_add(0, flat, torch.ones_like(flat, dtype=logits.dtype))[1:]
    per_token = 1 / max(num_tokens, 1)
    return (n * (counts * per_token * (scores.sum(0) * per_token)).sum()).to(kind)


def router_z_loss(logits: torch.Tensor) -> torch.Tensor:
    """The router z-loss of ST-MoE (Zoph et al., 2022, equation 5): the mean over tokens of logsumexp(logits) squared.

    Args:
        logits: `[num_tokens, num_choices]`.

    Returns, Raises: as `load_balancing_loss` has them.
    """
    kind, logits = logits.dtype, _rows_of(logits)
    return (logits.logsumexp(-1).square().sum() / max(len(logits), 1)).to(kind)


def _rows_of(logits: torch.Tensor) -> torch.Tensor:
    """In a type that can count tokens: bfloat16 ends at 256."""
    if logits.dim() != 2 or not logits.is_floating_point():
        got = f"{list(logits.shape)} of {str(logits.dtype).removeprefix('torch.')}"
        raise ValueError(f"logits must have shape [num_tokens, num_choices] and a floating dtype, got {got}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
