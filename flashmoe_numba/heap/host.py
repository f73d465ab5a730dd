"""Arrays of this process as a rank's memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from reference import Layout, MoEConfig
from reference.arrays import Array
from reference.layout import ALIGNMENT

from ..device.storage import as_storage
from ..processes.ownership import Owned
from .tensors import as_array


class HostMemory(Owned):
    """NumPy's arrays, which the kernel reads where they are. They begin with a line of the caches."""

    grows = True  # the system gives memory as it is touched

    def zeros(self, size: int, dtype: npt.DTypeLike) -> Array:
        return _aligned(np.zeros, size, dtype)

    def empty(self, size: int, dtype: npt.DTypeLike) -> Array:
        return _aligned(np.empty, size, dtype)

    def lend(self, array: Array, give_back: Callable[[Array], None]) -> Array:
        lent = np.frombuffer(array.data, array.dtype)  # views hold it: its own base is no array
        weakref.finalize(lent, give_back, array).atexit = False
        return lent

    def array(self, values: Array) -> Array:
        return values

    def make_wire(self, num_words: int, own: Array, layout: Layout, rank_idx: int) -> Array:
        return np.zeros(num_words, np.int64)

    def address(self, array: Array) -> int:
        return array.ctypes.data

    def to_host(self, array: Array) -> Array:
        return array.copy()

    def store(self, target: Array, values: Array) -> None:
        target[...] = values

    def copy(self, target: Array, source: Array) -> None:
        target[...] = source

    def aim(self, matrices: Any, rows: Array) -> None:
        """Nothing: the kernel is told of rows when it multiplies them."""

    def beside(self, matrices: Any) -> Any:
        """The same object, for the same reason."""
        return matrices

    def no_tokens(self, config: MoEConfig) -> Array:
        return np.empty((0, config.hidden), config.numpy_dtype)

    def check_tokens(self, name: str, x: Any, config: MoEConfig) -> Array:
        """One rank's tokens, as `adopt` wants them: the same array if it is contiguous and writable, else a copy.

        Raises:
            TypeError, ValueError: naming the rule, and both sides of it. Errors call it `name`.
        """
        x = as_array(name, x)
        if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name} must be a NumPy array without a mask, got {type(x).__name__}")
        if x.ndim != 2 or x.shape[1] != config.hidden:
            raise ValueError(f"{name} must have shape [num_tokens, hidden={config.hidden}], got {list(x.shape)}")
        if len(x) > config.num_tokens:
            raise ValueError(f"{name} must have at most config.num_tokens={config.num_tokens} tokens, got {len(x)}")
        if x.dtype != config.numpy_dtype:
            raise TypeError(f"{name} must have config's dtype {config.dtype}, got {x.dtype}")
        return np.require(np.asarray(x), requirements=("C_CONTIGUOUS", "ALIGNED", "WRITEABLE"))

    def adopt(self, x: Array) -> tuple[Array, Array, Array]:
        y = np.empty_like(x)
        return as_storage(x), as_storage(y), y

    def join(self, x: Any, parts: list[Any]) -> Any:
        return parts if isinstance(x, (list, tuple)) else np.stack(parts)


def _aligned(make: Callable[[int, npt.DTypeLike], Array], size: int, dtype: npt.DTypeLike) -> Array:
    item_bytes = np.dtype(dtype).itemsize
    array = make(size + ALIGNMENT // item_bytes, dtype)
    first = -array.ctypes.data % ALIGNMENT // item_bytes
    return array[first : first + size]
