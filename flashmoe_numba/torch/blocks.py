"""`replace_moe_blocks`: MoE blocks of a model that become ours where they are.

A block keeps its parameters, and with them its names in `state_dict`; it changes its class, as FSDP's `fully_shard`
does. What is known of a kind of block is in the families' table (`reference.families`), of which `adapter_for` makes an
`Adapter`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import nn

from reference.layout import SAVES
from reference.scalars import check_name

from .description import describe_config, describe_entry, is_matrix, training
from .families import Outside, families_of_block, outside_of, plan_block
from .ownership import OWNERS, Owner, check_sums, check_training, give_to_kernel, operands, tensor_at
from .ranks import Ranks
from .router_logits import show, shown_by
from .session import SESSION
from .training import layer_of

NOISES = ("jitter_noise", "router_jitter_noise", "input_jitter_noise")  # of public blocks and routers


@dataclass(frozen=True)
class Adapter:
    """How a block is computed.

    Args:
        paths: of its parameters and buffers that the layer takes.
        names: what these are, in the description's words.
        description: of the layer.
        outside: what the block does around the layer.
        ranks: the name of those that compute it together; None: this process alone.
        train: are there gradients?
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    description: str
    outside: Outside
    ranks: str | None
    train: bool = False


def replace_moe_blocks(
    model: nn.Module,
    *,
    train: bool = False,
    save: str = SAVES[0],
    fused_accumulation: bool = False,
    own: str = OWNERS[0],
    comm: Any = None,
    process_group: Any = None,
) -> list[str]:
    """Swap the MoE blocks of a model that the families' table knows, in place.

    Routing, shared experts and zero-computation experts are in the layer then, tokens are routed in float32, ties go to
    the lowest index. A block's own router is not called. With `train` hooks on it see the logits, so that a model's
    losses of them (`output_router_logits`) are there; without, nobody sees them. A block that returns them returns None
    in their place. A block that is not known stays as it is: look at what is returned.

    Args:
        model: from transformers, with its `config`.
        train, save, fused_accumulation: for gradients: see `MoE`. What parameters ask for (`requires_grad`) is left as
            it is.
        own: "parameters" or "packed": see `MoE`.
        comm, process_group: the ranks that compute the blocks together, each for its own tokens: see `MoE`.

    Returns:
        Names of the blocks that were swapped, seen from the model.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule; or there is no block to swap.
        NotImplementedError: naming what a known block computes that the layer does not.
    """
    check_name("own", own, OWNERS)
    check_training(train, save, fused_accumulation, own)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module of PyTorch, got {type(model).__name__}")
    blocks = [(name, block) for name, block in model.named_modules() if families_of_block(block)]
    if not blocks:
        rule = "model must have a block of a family in reference/families"
        raise ValueError(f"{rule} (`flashmoe models` lists them), got {type(model).__name__}")
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise ValueError(f"model must have a config of transformers, got {type(model).__name__} with config={config!r}")
    ranks = SESSION.ranks(comm, process_group)
    known = [(block, adapter_for(block, config.to_dict(), _layer_of(name), ranks)) for name, block in blocks]
    for block, adapter in known:
        if own == "packed":
            _check_packable(block, adapter)
    if train:
        known = [(block, _trained(block, adapter, save, fused_accumulation)) for block, adapter in known]
    for block, adapter in known:
        _swap(block, adapter, own)
    return [name for name, _ in blocks]


def adapter_for(block: nn.Module, model: Mapping[str, Any], layer: int, ranks: Ranks | None = None) -> Adapter:
    """How this block is computed by the layer.

    Args:
        model: the model's config.
        layer: the block's index, where the config has a value for each.
        ranks: those that compute it together.

    Raises:
        NotImplementedError: naming what it computes that the layer does not.
        ValueError: the experts cannot be shared out evenly among the ranks.
    """
    family, plan = plan_block(block, model, layer)
    entries = tuple(plan.tensors)
    if any(entry.per_expert for entry in entries):
        rule = "cannot be computed by FlashMoE: each of its experts has its own tensors"
        raise NotImplementedError(f"{type(block).__name__} {rule}")
    names = tuple(describe_entry(entry) for entry in entries)
    description = describe_config(names, plan.config)
    if ranks is not None:
        replace(plan.config, num_ranks=ranks.num_ranks)  # raises if they cannot be shared out
    paths = tuple(entry.name for entry in entries)
    return Adapter(paths, names, description, outside_of(family), None if ranks is None else ranks.name)


class Swapped(Owner):
    """What a swapped block's class has before its own."""

    _flashmoe_adapter: Adapter

    def forward(self, hidden_states: torch.Tensor, **inputs: Any) -> Any:
        adapter = self._flashmoe_adapter
        given = adapter.outside.given(self, **inputs)
        tensors, description = operands(self, adapter.paths, adapter.description, adapter.ranks)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        router = shown_by(self, adapter.paths, adapter.names) if adapter.train else None
        show_logits = router is not None and bool(router._forward_hooks)
        idx = given.get("topk_idx")
        y, logits, _ = layer_of(x, idx, None, None, tensors, description, train=adapter.train, show=show_logits)
        if router is not None and logits is not None:
            router(logits)
        return adapter.outside.finish(self, y.reshape(hidden_states.shape))


def _layer_of(name: str) -> int:
    """The index of a block by its name: "model.layers.3.mlp"."""
    match = re.search(r"\.(\d+)(\.|$)", name)
    return int(match[1]) if match else 0


def _trained(block: Any, adapter: Adapter, save: str, fused_accumulation: bool) -> Adapter:
    """The same, with gradients.

    Raises:
        NotImplementedError: in training the block computes what the layer does not.
    """
    noises = [(name, getattr(part, name, 0)) for part in block.modules() for name in NOISES]
    for name, noise in noises:
        if noise:
            rule = f"cannot be trained by FlashMoE: in training it routes with noise ({name}={noise})"
            raise NotImplementedError(f"{type(block).__name__} {rule}")
    check_sums(fused_accumulation, {path: tensor_at(block, path) for path in adapter.paths})
    return replace(adapter, train=True, description=training(adapter.description, save, fused_accumulation))


def _check_packable(block: Any, adapter: Adapter) -> None:
    """Where a matrix has rows of no expert, nothing would keep them."""
    for path, name in zip(adapter.paths, adapter.names, strict=True):
        if is_matrix(name) and "choice" in name:
            rule = f"{path} of {type(block).__name__} has rows of zero-computation experts, which no layer keeps"
            raise ValueError(f"own must be 'parameters', because {rule}; got 'packed'")


@cache
def _swapped(kind: Any) -> Any:
    return type(f"FlashMoE{kind.__name__}", (Swapped, kind), {})


def _swap(block: Any, adapter: Adapter, own: str) -> None:
    if own == "packed":
        give_to_kernel(block, adapter.paths, adapter.names, adapter.description, adapter.ranks)
    block._flashmoe_adapter = adapter
    kind: Any = type(block)
    block.__class__ = _swapped(kind)
    if adapter.train:
        show(block, adapter.paths, adapter.names)
    operands(block, adapter.paths, adapter.description, adapter.ranks)  # it has its number now, before any call
