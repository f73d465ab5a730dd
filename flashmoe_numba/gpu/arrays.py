"""Tokens and results as users hold them on a GPU: CuPy arrays, PyTorch tensors, Numba device arrays, and anything else
that DLPack or `__cuda_array_interface__` describes. Nothing is copied, except what is not contiguous.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import MoEConfig

from ..device.storage import storage_dtype


class GpuTokens:
    """One rank's tokens, checked.

    Args:
        original: as the user gave it.
        storage: the same memory as a contiguous CuPy array `[num_tokens, hidden]`, 16-bit floats as bit patterns.
    """

    def __init__(self, original: Any, storage: Any) -> None:
        self.original, self.storage = original, storage

    def __len__(self) -> int:
        return int(self.storage.shape[0])


def check_gpu_tokens(name: str, x: Any, config: MoEConfig, gpu: Any) -> GpuTokens:
    """`x` as tokens on `gpu`. Errors call it `name`. bfloat16, which CuPy lacks, may come as int16 bit patterns.

    Raises:
        TypeError, ValueError: naming the rule, and both sides of it.
    """
    if isinstance(x, np.ndarray):
        raise TypeError(f"{name} must be on the GPU, got a NumPy array: put it there, say with cupy.asarray")
    if not (hasattr(x, "__cuda_array_interface__") or hasattr(x, "__dlpack__")):
        raise TypeError(f"{name} must be an array on the GPU, got {type(x).__name__}")
    if is_torch(x) and not x.is_cuda:
        raise TypeError(f"{name} must be on the GPU, got a tensor on {x.device}: put it there with .cuda()")
    if element_name(x) not in (config.dtype, "int16" if config.dtype == "bfloat16" else config.dtype):
        raise TypeError(f"{name} must have config's dtype {config.dtype}, got {element_name(x)}")
    if len(x.shape) != 2 or x.shape[1] != config.hidden:
        raise ValueError(f"{name} must have shape [num_tokens, hidden={config.hidden}], got {list(x.shape)}")
    if x.shape[0] > config.num_tokens:
        raise ValueError(f"{name} must have at most config.num_tokens={config.num_tokens} tokens, got {x.shape[0]}")
    storage = as_cupy(x, config, gpu)
    if storage.device.id != gpu.device:
        raise ValueError(f"{name} must be on GPU {gpu.device}, where this layer is; it is on GPU {storage.device.id}")
    return GpuTokens(x, gpu.cupy.ascontiguousarray(storage))


def is_torch(x: Any) -> bool:
    """Is it a PyTorch tensor? Known without importing PyTorch."""
    return type(x).__module__.split(".")[0] == "torch"


def element_name(x: Any) -> str:
    """The name of an array's or tensor's dtype, as MoEConfig writes it."""
    return str(x.dtype).rpartition(".")[2]


def as_cupy(x: Any, config: MoEConfig, gpu: Any) -> Any:
    """The same memory as a CuPy array, 16-bit floats as bit patterns."""
    cupy, bits = gpu.cupy, storage_dtype(config.numpy_dtype)
    if is_torch(x):
        x = x.detach().contiguous()
        if config.dtype == "bfloat16":  # which CuPy does not take from others
            import torch

            x = x.view(torch.int16)
        return cupy.from_dlpack(x).view(bits)
    array = cupy.asarray(x) if hasattr(x, "__cuda_array_interface__") else cupy.from_dlpack(x)
    return cupy.ascontiguousarray(array).view(bits)


def empty_like(x: Any, gpu: Any) -> Any:
    """Room for results, of the kind of x."""
    if is_torch(x):
        import torch

        return torch.empty_like(x, memory_format=torch.contiguous_format)
    result = gpu.cupy.empty(x.shape, x.dtype)
    if isinstance(x, gpu.cupy.ndarray):
        return result
    from ..device.cuda_api import cuda

    return cuda.as_cuda_array(result)


def stack(x: Any, parts: list[Any], gpu: Any) -> Any:
    """Results of all ranks: one array if the tokens were one."""
    if isinstance(x, (list, tuple)):
        return parts
    if is_torch(x):
        import torch

        return torch.stack(parts)
    return gpu.cupy.stack([gpu.cupy.asarray(part) for part in parts])


def current_stream(x: Any, gpu: Any) -> int:
    """The caller's stream, by the framework that x belongs to."""
    if is_torch(x):
        import torch

        return int(torch.cuda.current_stream(x.device).cuda_stream)
    return int(gpu.cupy.cuda.get_current_stream(gpu.device).ptr)
