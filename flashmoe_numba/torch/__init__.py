"""The layer inside PyTorch: a module, an experts implementation of transformers, and blocks swapped in place.

docs/torch.md says what is noticed when weights change, and what cannot be. Importing this imports PyTorch; transformers
is imported by `register` and `replace_moe_blocks` only.
"""

from __future__ import annotations

from .blocks import replace_moe_blocks
from .joining import join
from .module import MoE
from .registration import register
from .session import release

__all__ = ["MoE", "join", "register", "release", "replace_moe_blocks"]
