"""A block's own state, a dictionary of tensors in memory, read like a folder.

NumPy's arrays are taken, and PyTorch's tensors by the buffers they share with NumPy, without an import of torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from reference.arrays import Array

from .tensor_file import NUMPY_NAMES, TensorInfo, array_dtype

BITS_OF = {"bfloat16": "short", **dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"), "byte")}
"""Types of PyTorch's that NumPy does not know, and as what it gets their bits."""
_TENSOR_NAMES = {numpy_name: name for name, numpy_name in NUMPY_NAMES.items()}


class State:
    """Tensors by name.

    Args:
        tensors: `module.state_dict()`, or arrays by the same names.

    Raises:
        TypeError: it is no mapping, or a value is no tensor of numbers; names it.
    """

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        if not isinstance(tensors, Mapping):
            raise TypeError(f"state must be a dictionary of tensors, got {type(tensors).__name__}")
        self._arrays = {name: as_array(name, tensor) for name, tensor in tensors.items()}
        self.bytes_read = 0

    @property
    def names(self) -> Set[str]:
        return self._arrays.keys()

    def where(self, name: str) -> str:
        """For messages."""
        return "state"

    def info(self, name: str) -> TensorInfo:
        array = self._arrays[name]
        dtype = _TENSOR_NAMES.get(array.dtype.name, array.dtype.name)
        return TensorInfo(dtype=dtype, shape=array.shape, begin=0, end=array.nbytes)

    def read(self, name: str, piece: int, num_pieces: int) -> Array:
        """One of `num_pieces` equal pieces along the first axis, as a view."""
        array = self._arrays[name]
        length = len(array) // num_pieces if array.ndim else 0
        part = array[piece * length : (piece + 1) * length] if array.ndim else array
        self.bytes_read += part.nbytes
        return part


def as_array(name: str, tensor: Any) -> Array:
    """A tensor of NumPy's or PyTorch's as an array, of the same memory where it is this machine's.

    Raises:
        TypeError: it is neither, or has no numbers in rows and columns here; names it.
    """
    if isinstance(tensor, np.ndarray):
        return tensor
    if not hasattr(tensor, "detach"):
        raise TypeError(f"state[{name!r}] must be a NumPy array or a PyTorch tensor, got {type(tensor).__name__}")
    try:
        return _numbers_of(tensor.detach().cpu())
    except (TypeError, RuntimeError) as error:  # on "meta", sparse, or of a type that NumPy does not know
        got = ", ".join(str(getattr(tensor, about, "unknown")) for about in ("dtype", "device", "layout"))
        raise TypeError(f"state[{name!r}] must be a dense tensor of numbers, got {got}: {error}") from None


def _numbers_of(tensor: Any) -> Array:
    for torch_name, bits in BITS_OF.items():
        if str(tensor.dtype) == f"torch.{torch_name}":
            integers: Array = tensor.view(getattr(tensor.new_empty(0), bits)().dtype).numpy()
            return integers.view(array_dtype(torch_name))
    array: Array = tensor.numpy()
    return array
