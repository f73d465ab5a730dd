"""A block's router as a place where its logits are shown, when the layer has made them.

transformers finds a model's router logits by hooks on the routers, which a swapped block does not call for their
results: it calls them with the layer's logits instead, which they return.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn


class Shown:
    """What such a router's class has before its own."""

    _flashmoe_bias: str | None

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits, with the bias that the router adds to its products."""
        return logits if self._flashmoe_bias is None else logits + getattr(self, self._flashmoe_bias)


def shown_by(block: nn.Module, paths: Sequence[str], names: Sequence[str]) -> Any:
    """The module in a block that has the router; None: it has no module of its own, or is a plain linear one."""
    path = _path_of("router", paths, names)
    parent = None if path is None or "." not in path else block.get_submodule(path.rpartition(".")[0])
    return None if type(parent) is nn.Linear else parent


def show(block: nn.Module, paths: Sequence[str], names: Sequence[str]) -> None:
    """Let the router return logits that it is called with."""
    router = shown_by(block, paths, names)
    if router is not None:
        bias = _path_of("router_bias", paths, names)
        router._flashmoe_bias = None if bias is None else bias.rpartition(".")[2]
        kind: Any = type(router)
        router.__class__ = _shown(kind)


def _path_of(array: str, paths: Sequence[str], names: Sequence[str]) -> str | None:
    found = [path for path, name in zip(paths, names, strict=True) if name.partition(":")[0] == array]
    return found[0] if found else None


@cache
def _shown(kind: Any) -> Any:
    return type(f"FlashMoE{kind.__name__}", (Shown, kind), {})
