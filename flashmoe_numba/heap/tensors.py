"""PyTorch's tensors of the host as NumPy's arrays, and back: the same memory, nothing is copied.

PyTorch is imported only where a tensor was given.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference.arrays import Array
from reference.formats import element_dtype

from ..gpu.arrays import is_torch

NO_GRADIENT = (
    "FlashMoE is no operator of PyTorch: flashmoe_numba.torch (MoE, replace_moe_blocks, register) has gradients, with "
    "train=True; or call it under torch.no_grad() or torch.inference_mode()"
)


def as_array(name: str, value: Any) -> Any:
    """A tensor of the host as an array of its memory; anything else as it is.

    Raises:
        ValueError: gradients are asked for.
    """
    if not is_torch(value) or value.device.type != "cpu":
        return value
    import torch

    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require gradients: {NO_GRADIENT}")
    value = value.detach()
    if value.dtype == torch.bfloat16:  # NumPy's own types have no such
        bits: Array = value.view(torch.int16).numpy()
        return bits.view(element_dtype("bfloat16"))
    return value.numpy()


def as_tensor(array: Array) -> Any:
    """A tensor of this array's memory."""
    import torch

    if array.dtype == element_dtype("bfloat16"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def like_given(x: Any, y: Any) -> Any:
    """Results `y` as tensors where the tokens `x` were; lists part by part."""
    if isinstance(y, list):
        return [like_given(*pair) for pair in zip(x, y, strict=True)]
    return as_tensor(y) if is_torch(x) and isinstance(y, np.ndarray) else y
