"""The layer as an operator of PyTorch, so that graphs of torch.compile and torch.export can hold it.

It has no gradient: where one is asked for, the call itself raises, in a graph too.
"""

from __future__ import annotations

from typing import Any

import torch

from ..heap.tensors import NO_GRADIENT
from .session import SESSION, Entry


@torch.library.custom_op("flashmoe::moe_layer", mutates_args=())
def moe_layer(
    x: torch.Tensor,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    logits: torch.Tensor | None,
    tensors: list[torch.Tensor],
    description: str,
) -> torch.Tensor:
    """One MoE layer.

    Args:
        x: `[num_tokens, hidden]`, any number of tokens.
        topk_idx, topk_weights: `[num_tokens, num_topk]`, a routing from outside; None: the kernel routes.
        logits: `[num_tokens, num_choices]`, in place of the router's products.
        tensors: the weights, as `description` says (description.py).

    Returns:
        `[num_tokens, hidden]`, of x's type.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
        RuntimeError: gradients are asked for.
    """
    num_topk = None if topk_idx is None else topk_idx.shape[1]
    entry = SESSION.entry(description, tensors, num_topk)
    limit = entry.shared.layer.config.num_tokens
    if len(x) <= limit:
        return _call(entry, x, topk_idx, topk_weights, logits)
    given = (x, topk_idx, topk_weights, logits)
    starts = range(0, len(x), limit)
    parts = [[None if tensor is None else tensor[start : start + limit] for tensor in given] for start in starts]
    return torch.cat([_call(entry, *part) for part in parts])


def _call(entry: Entry, x: Any, topk_idx: Any, topk_weights: Any, logits: Any) -> torch.Tensor:
    """Of tokens that fit in one call."""
    given = dict(topk_idx=topk_idx, topk_weights=topk_weights, logits=logits)
    arguments = {name: [tensor.cpu()] for name, tensor in given.items() if tensor is not None}
    with torch.no_grad():
        y: torch.Tensor = entry.shared.layer([x], **arguments, weights=entry.packed)[0]
    return y


@moe_layer.register_fake
def _shape(
    x: torch.Tensor,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    logits: torch.Tensor | None,
    tensors: list[torch.Tensor],
    description: str,
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _refuse(ctx: Any, inputs: Any, output: Any) -> None:
    raise RuntimeError(NO_GRADIENT)


def _no_backward(ctx: Any, grad: Any) -> None:
    raise RuntimeError(NO_GRADIENT)


moe_layer.register_autograd(_no_backward, setup_context=_refuse)
