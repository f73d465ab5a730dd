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

from reference.scalars import check_name

from .description import describe_config, describe_entry, is_matrix
from .families import Outside, families_of_block, outside_of, plan_block
from .operator import moe_layer
from .ownership import OWNERS, Owner, give_to_kernel, operands
from .ranks import Ranks
from .session import SESSION


@dataclass(frozen=True)
class Adapter:
    """How a block is computed.

    Args:
        paths: of its parameters and buffers that the layer takes.
        names: what these are, in the description's words.
        description: of the layer.
        outside: what the block does around the layer.
        ranks: the name of those that compute it together; None: this process alone.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    description: str
    outside: Outside
    ranks: str | None


def replace_moe_blocks(
    model: nn.Module, *, own: str = OWNERS[0], comm: Any = None, process_group: Any = None
) -> list[str]:
    """Swap the MoE blocks of a model that the families' table knows, in place.

    Routing, shared experts and zero-computation experts are in the layer then, tokens are routed in float32, ties go to
    the lowest index. A block's own router is not called, and nobody sees its logits (`output_router_logits`): a block
    that returns them returns None in their place. A block that is not known stays as it is: look at what is returned.

    Args:
        model: from transformers, with its `config`, in evaluation: there is no backward.
        own: "parameters" or "packed": see `MoE`.
        comm, process_group: the ranks that compute the blocks together, each for its own tokens: see `MoE`.

    Returns:
        Names of the blocks that were swapped, seen from the model.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule; or there is no block to swap.
        NotImplementedError: naming what a known block computes that the layer does not.
    """
    check_name("own", own, OWNERS)
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
        y = moe_layer(x, given.get("topk_idx"), None, None, tensors, description)
        return adapter.outside.finish(self, y.reshape(hidden_states.shape))


def _layer_of(name: str) -> int:
    """The index of a block by its name: "model.layers.3.mlp"."""
    match = re.search(r"\.(\d+)(\.|$)", name)
    return int(match[1]) if match else 0


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
    operands(block, adapter.paths, adapter.description, adapter.ranks)  # it has its number now, before any call
