"""The layer inside PyTorch: a module, an experts implementation of transformers, and blocks swapped in place.

docs/torch.md says what is noticed when weights change, and what cannot be. Importing this imports PyTorch; transformers
is imported by `register` and `replace_moe_blocks` only.
"""

from __future__ import annotations

from .blocks import replace_moe_blocks
from .joining import join
from .losses import load_balancing_loss, router_z_loss
from .module import MoE
from .registration import register
from .replicated import sum_replicated_gradients
from .session import release

__all__ = [
    "MoE",
    "join",
    "load_balancing_loss",
    "register",
    "release",
    "replace_moe_blocks",
    "router_z_loss",
    "sum_replicated_gradients",
]
