"""The layer with gradients, as two operators: a forward that keeps what its backward needs, and the backward.

What was kept is no tensor: a ticket stands for it in graphs (kept_calls.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.forward_ad import unpack_dual

from ..heap.tensors import as_tensor
from ..layer.gradients import Gradients
from .description import FUSED, read
from .kept_calls import KeptCalls, kept_for, ticket_for
from .operator import moe_layer, parts_of, run
from .ownership import check_sums
from .rounds import BACKWARD
from .session import PLAIN, SESSION
from .weight_gradients import begin_from, fill, groups, is_of_experts

Tensors = Sequence[torch.Tensor]
FIRST_ONLY = (
    "create_graph must be False: a MoE layer has no second derivatives, and without an error those by way of its "
    "tokens and its routing would be zero"
)
BACKWARD_ONLY = (
    "tokens, weights, logits and parameters must have no tangents: a MoE layer has no forward-mode derivatives (jvp), "
    "and without an error they would be zero; use reverse mode, with train=True"
)
COMPILED = (
    "fused_accumulation=True adds to .grad where it is, which no graph of torch.compile can hold: call it in eager mode"
)


def layer_of(
    x: torch.Tensor,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    logits: torch.Tensor | None,
    tensors: list[torch.Tensor],
    description: str,
    *,
    train: bool,
    show: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """(y, logits, choices) by the operator that is wanted; without gradients and `show`, y alone.

    Args:
        train: was the layer made for gradients?
        show: are logits and choices wanted in any case?
    """
    arguments = x, topk_idx, topk_weights, logits, tensors, description
    given = [tensor for tensor in (x, topk_weights, logits, *tensors) if tensor is not None]
    if any(unpack_dual(tensor).tangent is not None for tensor in given):
        raise RuntimeError(BACKWARD_ONLY)
    if train and (show or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))):
        y, made, idx, _ = moe_layer_kept(*arguments)
        return y, made, idx
    return moe_layer(*arguments), None, None


@torch.library.custom_op("flashmoe::moe_layer_kept", mutates_args=())
def moe_layer_kept(
    x: torch.Tensor,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    logits: torch.Tensor | None,
    tensors: list[torch.Tensor],
    description: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`moe_layer`, with gradients of x, topk_weights, logits and tensors; of a description with `save`.

    Returns:
        y; logits `[num_tokens, num_choices]`, in the type of sums, as the product with the router makes them or as they
        were given, `[num_tokens, 0]` where topk_weights were given; the choices, int64 `[num_tokens, num_topk]`; the
        ticket.
    """
    names, fields = read(description)
    check_sums(fields.get(FUSED, False), {name.partition(":")[0]: of for name, of in zip(names, tensors, strict=True)})
    y, entry, saved = run(x, topk_idx, topk_weights, logits, tensors, description, keep=True)
    made = torch.cat([as_tensor(call.logits[0]) for call in saved])
    idx = torch.cat([as_tensor(call.topk_idx[0]) for call in saved]).long()
    return y, made.to(x.device), idx.to(x.device), ticket_for(KeptCalls(entry, saved), x.device)


@torch.library.custom_op("flashmoe::moe_layer_backward", mutates_args=())
def moe_layer_backward(
    ticket: torch.Tensor,
    dy: torch.Tensor,
    logits_gradient: torch.Tensor | None,
    begin: list[torch.Tensor],
    tensors: list[torch.Tensor],
    description: str,
    wanted: list[bool],
    num_topk: int,
    num_choices: int,
) -> list[torch.Tensor]:
    """The gradients of what `moe_layer_kept` with this ticket was given.

    Args:
        dy: `[num_tokens, hidden]`.
        logits_gradient: `[num_tokens, num_choices]`, by way of losses that read the logits, or None.
        begin: of each wanted tensor, what its gradient's sums begin with; empty: zeros.
        tensors, description: as the forward had them.
        wanted: of each tensor, whether its gradient is.
        num_choices: 0 where topk_weights were given.

    Returns:
        Of x, of topk_weights `[num_tokens, num_topk]` and of logits `[num_tokens, num_choices]`, both in the type of
        sums; and of each wanted tensor, in its shape and type.

    Raises:
        FlashMoEError: what was kept is not here, or a call was given up.
        ValueError: the weights were loaded anew since the forward.
    """
    names, fields = read(description)
    asked = [name for name, want in zip(names, wanted, strict=True) if want]
    outs = [torch.zeros_like(tensor) for tensor, want in zip(tensors, wanted, strict=True) if want]
    ranks, which = SESSION.ranks_of(fields), groups(asked)
    with SESSION.ending(ranks):
        kept = kept_for(ticket)
        calls = nullcontext() if ranks is None else ranks.call(fields["module"], len(kept.saved), BACKWARD)
        with calls, torch.no_grad():
            sums = None
            if begin:
                sums = kept.entry.shared.layer.no_gradients(kept.entry.packed, **which)
                begin_from(sums, asked, begin, fields)
            parts = []
            for call in range(len(kept.saved)):
                part, sums = _back(kept, call, dy, logits_gradient, sums, which)
                parts.append(part)
            assert sums is not None, "a forward has made a call"
            fill(outs, sums, asked, fields)
    dx, pairs, logits = (torch.cat(each) for each in zip(*parts, strict=True))
    return [dx, pairs.to(dy.device), logits.to(dy.device), *outs]


def _back(
    kept: KeptCalls,
    call: int,
    dy: torch.Tensor,
    logits_gradient: torch.Tensor | None,
    sums: Gradients | None,
    which: dict[str, bool],
) -> tuple[tuple[torch.Tensor, ...], Gradients]:
    """((gradients of x, of topk_weights, of logits) of one call, all), whose sums go on with those before, if any."""
    layer, alone = kept.entry.shared.layer, kept.entry.shared.ranks is None
    part = parts_of(len(kept.saved), layer.config.num_tokens)[call]
    given: list[Any] = [None if tensor is None else tensor[part] for tensor in (dy, logits_gradient)]
    given = [[tensor] if alone and tensor is not None else tensor for tensor in given]
    found = layer.backward(kept.saved[call], given[0], logits_gradient=given[1], into=sums, retain=True, **which)
    x, pairs, logits = (of[0] if alone else of for of in (found.x, found.topk_weights, found.logits))
    pairs = as_tensor(pairs)
    return (x, pairs, pairs.new_zeros((len(pairs), 0)) if logits is None else as_tensor(logits)), found


@moe_layer_kept.register_fake
def _kept_shapes(
    x: torch.Tensor,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    logits: torch.Tensor | None,
    tensors: list[torch.Tensor],
    description: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    _, fields = read(description)
    num_topk = fields["num_topk"] if topk_idx is None else topk_idx.shape[1]
    num_choices = fields["num_experts"] + fields.get("num_zero", 0) if topk_weights is None else 0
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((len(x), num_choices), dtype=_type_of_sums(x)),
        x.new_empty((len(x), num_topk), dtype=torch.int64),
        x.new_empty(1, dtype=torch.int64),
    )


@moe_layer_backward.register_fake
def _gradient_shapes(
    ticket: torch.Tensor,
    dy: torch.Tensor,
    logits_gradient: torch.Tensor | None,
    begin: list[torch.Tensor],
    tensors: list[torch.Tensor],
    description: str,
    wanted: list[bool],
    num_topk: int,
    num_choices: int,
) -> list[torch.Tensor]:
    found = [torch.empty_like(dy, memory_format=torch.contiguous_format)]
    found += [dy.new_empty((len(dy), width), dtype=_type_of_sums(dy)) for width in (num_topk, num_choices)]
    return found + [torch.empty_like(tensor) for tensor, want in zip(tensors, wanted, strict=True) if want]


def _type_of_sums(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _set_up(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, topk_weights, logits, tensors, ctx.description = inputs
    y, made, idx, ticket = output
    ctx.save_for_backward(ticket, *tensors)  # PyTorch finds out whether they have changed
    ctx.shape, ctx.num_topk, ctx.num_choices = y.shape, idx.shape[1], made.shape[1]
    ctx.types = [None if tensor is None else tensor.dtype for tensor in (topk_weights, logits)]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: torch.Tensor | None, d_logits: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # what was kept is no tensor, so the gradients' graph would end here without a word
        raise RuntimeError(FIRST_ONLY)
    ticket, *tensors = ctx.saved_tensors
    for_x, _, for_weights, for_logits, wanted, _ = ctx.needs_input_grad
    if dy is None:  # a loss of the logits alone
        x_type = tensors[[name.partition(":")[0] for name in read(ctx.description)[0]].index("down_proj")].dtype
        dy = ticket.new_zeros(ctx.shape, dtype=x_type)
    if d_logits is not None and ctx.num_choices == 0:
        d_logits = None
    begin = _begin(ctx.description, tensors, wanted)
    sizes = ctx.num_topk, ctx.num_choices
    dx, pairs, logits, *found = moe_layer_backward(
        ticket, dy, d_logits, begin, tensors, ctx.description, list(wanted), *sizes
    )
    left = iter(found)
    gradients = [next(left) if want else None for want in wanted]
    if begin:
        gradients = _into_grad(read(ctx.description)[0], tensors, gradients)
    weights_type, logits_type = ctx.types
    d_weights = pairs.to(weights_type) if for_weights else None
    return dx if for_x else None, None, d_weights, logits.to(logits_type) if for_logits else None, gradients, None


def _begin(description: str, tensors: Tensors, wanted: Sequence[bool]) -> list[torch.Tensor]:
    """What the sums of each wanted tensor begin with, if those of experts go on from their `.grad`."""
    names, fields = read(description)
    if not fields.get(FUSED, False):
        return []
    if torch.compiler.is_compiling() or any(type(tensor) not in PLAIN for tensor in tensors):
        raise RuntimeError(COMPILED)
    asked = [(name, tensor) for name, tensor, want in zip(names, tensors, wanted, strict=True) if want]
    return [tensor.grad if _goes_on(name, tensor) else torch.zeros_like(tensor) for name, tensor in asked]


def _goes_on(name: str, tensor: torch.Tensor) -> bool:
    return is_of_experts(name) and tensor.grad is not None


def _into_grad(
    names: Sequence[str], tensors: Tensors, gradients: list[torch.Tensor | None]
) -> list[torch.Tensor | None]:
    """Those that PyTorch gets; sums that went on from a `.grad` go where that is."""
    left: list[torch.Tensor | None] = []
    for name, tensor, gradient in zip(names, tensors, gradients, strict=True):
        if gradient is not None and _goes_on(name, tensor):
            tensor.grad.copy_(gradient)
            gradient = None
        left.append(gradient)
    return left


moe_layer_kept.register_autograd(_backward, setup_context=_set_up)
