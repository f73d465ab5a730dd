"""The layer as an operator of PyTorch, so that graphs of torch.compile and torch.export can hold it.

This one has no gradient: where one is asked for, the call itself raises, in a graph too. training.py has the others.
"""

from __future__ import annotations

from typing import Any

import torch

from ..layer.saved import SavedCall
from .description import NUM_TOKENS, TRAINING, read
from .ownership import operands
from .ranks import Ranks
from .rounds import FORWARD, KEPT_FORWARD
from .session import SESSION, Entry

NO_GRADIENT = (
    "this layer was made for inference, without the transposed copy of its matrices that gradients need: make it with "
    "train=True (MoE, replace_moe_blocks, register); or call it under torch.no_grad() or torch.inference_mode(), or "
    "take the parameters out of training with requires_grad_(False)"
)
NOT_KEPT = "gradients are asked of moe_layer, which keeps nothing for them: call the module, or moe_layer_kept"
Calls = tuple[torch.Tensor, Entry, list[SavedCall]]  # y, the weights, and what was kept


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
        x: `[num_tokens, hidden]`, any number of tokens; of a layer with a capacity, no more than a call takes.
        topk_idx, topk_weights: `[num_tokens, num_topk]`, a routing from outside; None: the kernel routes. A router with
            choice "given" takes topk_idx alone.
        logits: `[num_tokens, num_choices]`, in place of the router's products.
        tensors: the weights, as `description` says (description.py).

    Returns:
        `[num_tokens, hidden]`, of x's type.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
        RuntimeError: gradients are asked for.
    """
    return run(x, topk_idx, topk_weights, logits, tensors, description, keep=False)[0]


def run(
    x: torch.Tensor,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    logits: torch.Tensor | None,
    tensors: list[torch.Tensor],
    description: str,
    *,
    keep: bool,
) -> Calls:
    """The operator's calls of its layer.

    Args:
        keep: for a backward.
    """
    arguments = dict(topk_idx=topk_idx, topk_weights=topk_weights, logits=logits)
    given = {name: tensor for name, tensor in arguments.items() if tensor is not None}
    for name, tensor in given.items():
        if tensor.dim() != 2 or len(tensor) != len(x):
            raise ValueError(f"{name} must have a row for each of {len(x)} tokens, got shape {list(tensor.shape)}")
    num_topk = None if topk_idx is None else topk_idx.shape[1]
    _, fields = read(description)
    ranks = SESSION.ranks_of(fields)
    num_calls = max(1, -(-len(x) // fields.get("num_tokens", NUM_TOKENS)))
    if ranks is None:
        return _in_calls(SESSION.entry(description, tensors, num_topk), x, given, num_calls, keep)
    ranks.num_topk[fields["module"]] = num_topk
    ranks.mark(fields["module"], tensors, description)
    calls = ranks.call(fields["module"], num_calls, KEPT_FORWARD if keep else FORWARD)
    with SESSION.ending(ranks), calls as num_calls:
        return _in_calls(SESSION.entry(description, tensors, num_topk), x, given, num_calls, keep)


def serve(ranks: Ranks, number: int, num_calls: int) -> None:
    """Take part in the others' call of a module, without tokens.

    Raises:
        FlashMoEError: this rank does not have the module.
    """
    tensors, description = operands(*ranks.member(number), ranks.name)
    ranks.mark(number, tensors, description)
    entry = SESSION.entry(description, tensors, ranks.num_topk.get(number))
    config = entry.shared.layer.config
    x = torch.empty((0, config.hidden), dtype=getattr(torch, config.dtype), device=tensors[0].device)
    given = {"topk_idx": torch.empty((0, config.num_topk), dtype=torch.int64)}
    _in_calls(entry, x, given if config.router_kind.choice == "given" else {}, num_calls, keep=False)


def _in_calls(entry: Entry, x: torch.Tensor, given: dict[str, torch.Tensor], num_calls: int, keep: bool) -> Calls:
    """In so many calls of the layer, of which the last may have no tokens."""
    config = entry.shared.layer.config
    if num_calls > 1 and config.capacity is not None:
        limit = f"num_tokens={config.num_tokens} tokens"
        rule = f"capacity must be None for more than {limit}, because it is that of one call"
        whose = f"{len(x)} tokens" if len(x) > config.num_tokens else "more on another rank"
        raise ValueError(f"{rule}; got {config.capacity} and {whose}")
    ys, kept = [], []
    for part in parts_of(num_calls, config.num_tokens):
        y, saved = _call(entry, x[part], {name: tensor[part] for name, tensor in given.items()}, keep)
        ys.append(y)
        kept += [] if saved is None else [saved]
    return ys[0] if num_calls == 1 else torch.cat(ys), entry, kept


def parts_of(num_calls: int, num_tokens: int) -> list[slice]:
    """The rows of each call."""
    return [slice(call * num_tokens, (call + 1) * num_tokens) for call in range(num_calls)]


def _call(
    entry: Entry, x: torch.Tensor, given: dict[str, torch.Tensor], keep: bool
) -> tuple[torch.Tensor, SavedCall | None]:
    """Of tokens that fit in one call; the layer judges which arguments can stand together."""
    layer, alone = entry.shared.layer, entry.shared.ranks is None
    arguments: dict[str, Any] = {name: [tensor.cpu()] if alone else tensor.cpu() for name, tensor in given.items()}
    tokens: Any = [x] if alone else x
    with torch.no_grad():
        saved = None
        if keep:
            y, saved = layer.forward(tokens, **arguments, weights=entry.packed)
        else:
            y = layer(tokens, **arguments, weights=entry.packed)
    return y[0] if alone else y, saved


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
    raise RuntimeError(NO_GRADIENT if TRAINING not in read(inputs[-1])[1] else NOT_KEPT)


def _no_backward(ctx: Any, grad: Any) -> None:
    raise RuntimeError(NO_GRADIENT)


moe_layer.register_autograd(_no_backward, setup_context=_refuse)
