"""`replace_moe_blocks`: MoE blocks of a model that become ours where they are.

A block keeps its parameters, and with them its names in `state_dict`; it changes its class, as FSDP's `fully_shard`
does. What is known of a kind of block is an `Adapter`, found by `adapter_for`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from reference.scalars import check_name

from .description import describe, rename
from .experts import activation_of, describe_experts
from .operator import moe_layer
from .ownership import OWNERS, give_to_kernel, operands

ROUTERS = ("kernel", "torch")


@dataclass(frozen=True)
class Adapter:
    """How a block is computed.

    Args:
        paths: of its parameters that the layer takes, router included where the kernel routes.
        names: of these in the description.
        description: of the layer.
        route: (topk_idx, topk_weights) of `[num_tokens, hidden]`, by the block's own router; None: the kernel does.
        finish: what the block adds to the experts' sum; it is given (block, tokens, sum), and returns the sum.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    description: str
    route: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    finish: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor] | None = None


def replace_moe_blocks(model: nn.Module, *, router: str = ROUTERS[0], own: str = OWNERS[0]) -> list[str]:
    """Swap the MoE blocks of a model that `adapter_for` knows, in place.

    For the families that ignore `experts_implementation`, and for others to have their routing in the kernel, too. A
    block that is not known stays as it is: look at what is returned.

    Args:
        model: from transformers, in evaluation: there is no backward.
        router: "kernel": tokens are routed by the layer where it can, in float32, ties to the lowest index. Then a
            block's own router is not called, and nobody sees its logits (`output_router_logits`). "torch": by the
            block's own router.
        own: "parameters" or "packed": see `MoE`.

    Returns:
        Names of the blocks that were swapped, seen from the model.

    Raises:
        ValueError: naming the argument, its value and the rule; or there is no block to swap.
        NotImplementedError: naming what a known block computes that the layer does not.
    """
    check_name("router", router, ROUTERS)
    check_name("own", own, OWNERS)
    found = [(name, block, adapter_for(block, router)) for name, block in model.named_modules()]
    known = [(name, block, adapter) for name, block, adapter in found if adapter is not None]
    if not known:
        kinds = ", ".join(sorted(_ADAPTERS))
        raise ValueError(f"model must have a block of a kind that is known ({kinds}), got {type(model).__name__}")
    for _, block, adapter in known:
        _swap(block, adapter, own)
    return [name for name, _, _ in known]


def adapter_for(block: nn.Module, router: str = ROUTERS[0]) -> Adapter | None:
    """How this block is computed by the layer; None where it is no block, or none that is known."""
    make = _ADAPTERS.get(type(block).__name__)
    return None if make is None else make(block, router)


class Swapped(nn.Module):
    """What a swapped block's class has before its own."""

    _flashmoe_adapter: Adapter

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        adapter = self._flashmoe_adapter
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        routing = (None, None) if adapter.route is None else adapter.route(self, x)
        tensors, description = operands(self, adapter.paths, adapter.description)
        y = moe_layer(x, *routing, tensors, description)
        if adapter.finish is not None:
            y = adapter.finish(self, x, y)
        return y.reshape(hidden_states.shape)


@cache
def _swapped(kind: Any) -> Any:
    return type(f"FlashMoE{kind.__name__}", (Swapped, kind), {})


def _swap(block: Any, adapter: Adapter, own: str) -> None:
    if own == "packed":
        give_to_kernel(block, adapter.paths, adapter.names, adapter.description)
    block._flashmoe_adapter = adapter
    kind: Any = type(block)
    block.__class__ = _swapped(kind)


# what is known


def _softmax_block(block: Any, router: str) -> Adapter:
    """Mixtral's and its kin: `gate` scores by a softmax over all experts, `experts` are decorated."""
    names, description = describe_experts(block.experts)
    paths, finish = [f"experts.{name}" for name in names], _shared_finish if hasattr(block, "shared_expert") else None
    description = f"{description};num_topk={block.gate.top_k}"
    if router == "torch":
        return Adapter(tuple(paths), tuple(names), description, _own_route, finish)
    renormalize = bool(getattr(block.gate, "norm_topk_prob", True))
    description = f"{rename(description, ['router', *names])};renormalize={renormalize}"
    return Adapter(("gate.weight", *paths), ("router", *names), description, finish=finish)


def _own_route(block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _, weights, idx = block.gate(x)
    return idx, weights


def _shared_finish(block: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Qwen2-MoE's expert that every token goes through."""
    return y + torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)


def _jetmoe_block(block: Any, router: str) -> Adapter:
    """Softmax of the chosen logits, which is that of all divided by its sum; a bias beside the experts."""
    paths = ("router.layer.weight", "input_linear.weight", "output_linear.weight")
    names = ("router", "gate_up_proj", "down_proj")
    kind = dict(gated=True, activation=activation_of(block, block.activation), num_topk=block.router.top_k)
    if router == "kernel":
        return Adapter(paths, names, describe(names, **kind), finish=_jetmoe_finish)
    return Adapter(paths[1:], names[1:], describe(names[1:], **kind), _jetmoe_route, _jetmoe_finish)


def _jetmoe_route(block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits, idx = block.router.layer(x).float().topk(block.router.top_k, dim=1)
    return idx, torch.softmax(logits, dim=1).type_as(x)


def _jetmoe_finish(block: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y + block.bias


def _dbrx_block(block: Any, router: str) -> Adapter:
    """Experts and ffn are one axis; the chosen probabilities are divided by their p-norm."""
    names = ("gate_proj", "up_proj", "down_proj")
    paths, mlp = tuple(f"experts.mlp.{name}" for name in ("w1", "v1", "w2")), block.experts.mlp
    kind: dict[str, Any] = dict(gated=True, activation=activation_of(block, mlp.activation_fn))
    kind |= dict(num_topk=block.top_k, flat=mlp.moe_num_experts)
    norm = block.moe_normalize_expert_weights
    if router == "torch" or norm not in (None, 1, 1.0):
        return Adapter(paths, names, describe(names, **kind), _dbrx_route)
    kind["renormalize"] = norm is not None
    with_router = ("router", *names)
    return Adapter(("router.layer.weight", *paths), with_router, describe(with_router, **kind))


def _dbrx_route(block: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, idx = block.route_tokens_to_experts(block.router(x))
    return idx, weights


_ADAPTERS: dict[str, Callable[[Any, str], Adapter]] = {
    "MixtralSparseMoeBlock": _softmax_block,
    "Qwen3MoeSparseMoeBlock": _softmax_block,
    "OlmoeSparseMoeBlock": _softmax_block,
    "Qwen2MoeSparseMoeBlock": _softmax_block,
    "JetMoeMoE": _jetmoe_block,
    "DbrxFFN": _dbrx_block,
}
