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
    """`x` as tokens on `gpu`. Errors call it `name`. bfloat16 may come as int16 bit patterns: not every CuPy has it.

    Raises:
        TypeError, ValueError: naming the rule, and both sides of it.
    """
    if isinstance(x, np.ndarray):
        raise TypeError(f"{name} must be on the GPU, got a NumPy array: put it there, say with cupy.asarray")
    if is_torch(x):  # first, because a tensor that requires a gradient raises when it is asked for its interface
        if not x.is_cuda:
            raise TypeError(f"{name} must be on the GPU, got a tensor on {x.device}: put it there with .cuda()")
    elif not (hasattr(x, "__cuda_array_interface__") or hasattr(x, "__dlpack__")):
        raise TypeError(f"{name} must be an array on the GPU, got {type(x).__name__}")
    if element_name(x) not in (config.dtype, config.format.exchanged.name):
        raise TypeError(f"{name} must have config's dtype {config.dtype}, got {element_name(x)}")
    if len(x.shape) != 2 or x.shape[1] != config.hidden:
        raise ValueError(f"{name} must have shape [num_tokens, hidden={config.hidden}], got {list(x.shape)}")
    if x.shape[0] > config.num_tokens:
        raise ValueError(f"{name} must have at most config.num_tokens={config.num_tokens} tokens, got {x.shape[0]}")
    with gpu.here:
        array = as_cupy(x, config, gpu)
        device = x.device.index if is_torch(x) else array.device.id
        if device != gpu.device:
            raise ValueError(f"{name} must be on GPU {gpu.device}, where this layer is; it is on GPU {device}")
        return GpuTokens(x, gpu.cupy.ascontiguousarray(array))


def is_torch(x: Any) -> bool:
    """Is it a PyTorch tensor? Known without importing PyTorch."""
    return type(x).__module__.split(".")[0] == "torch"


def element_name(x: Any) -> str:
    """The name of an array's or tensor's dtype, as MoEConfig writes it."""
    return str(x.dtype).rpartition(".")[2]


def is_numba(x: Any) -> bool:
    """Is it a Numba device array? Known without importing numba-cuda."""
    return type(x).__module__.split(".")[0] in ("numba", "numba_cuda")


def as_cupy(x: Any, config: MoEConfig, gpu: Any) -> Any:
    """The same memory as a CuPy array, 16-bit floats as bit patterns.

    Tensors come by their CUDA array interface: DLPack orders streams, which breaks the capture of a graph.
    """
    cupy, bits = gpu.cupy, config.format.storage
    if x.shape[0] == 0 and not isinstance(x, cupy.ndarray):  # others give no address, by which CuPy looks for the GPU
        return cupy.empty(tuple(x.shape), bits)
    if is_torch(x):
        x = x.detach().contiguous()
        if config.format.exchanged != config.format.dtype:  # bfloat16, which the interface cannot name
            import torch

            x = x.view(getattr(torch, config.format.exchanged.name))
    if isinstance(x, cupy.ndarray):  # as it is: asarray would copy what is on another GPU
        return x.view(bits)
    return (cupy.asarray(x) if hasattr(x, "__cuda_array_interface__") else cupy.from_dlpack(x)).view(bits)


def empty_like(x: Any, gpu: Any) -> Any:
    """Room for results: a tensor for a tensor, Numba's for Numba's, else a CuPy array."""
    if is_torch(x):
        import torch

        return torch.empty_like(x, memory_format=torch.contiguous_format)
    with gpu.here:
        return like(x, gpu.cupy.empty(x.shape, x.dtype))


def stack(x: Any, parts: list[Any], gpu: Any) -> Any:
    """Results of all ranks: one array if the tokens were one."""
    if isinstance(x, (list, tuple)):
        return parts
    if is_torch(x):
        import torch

        return torch.stack(parts)
    with gpu.here:
        arrays = [gpu.cupy.asarray(part) for part in parts]
        bits = storage_dtype(arrays[0].dtype)
        return like(x, gpu.cupy.stack([array.view(bits) for array in arrays]).view(arrays[0].dtype))


def like(x: Any, array: Any) -> Any:
    """A CuPy array as the kind of x, if that is Numba's."""
    if not is_numba(x):
        return array
    from ..device.cuda_api import device_array

    return device_array(array)


def current_stream(x: Any, gpu: Any) -> int:
    """The caller's stream, by the framework that x belongs to."""
    if is_torch(x):
        import torch

        return int(torch.cuda.current_stream(x.device).cuda_stream)
    return int(gpu.current_stream())
