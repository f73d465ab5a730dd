"""CuPy's arrays: `ndarray` and what makes one. The stand-in gives the class its `space` and `queues`.

No subclass of NumPy's, which the layer must refuse. Whatever fills an array is put on the current stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn, Self

import numpy as np
import numpy.typing as npt

from reference.arrays import Array

from .queues import Queues
from .space import Space

Shape = int | Sequence[int]


class UnownedMemory:
    """Memory that somebody else frees."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int) -> None:
        self.ptr, self.size, self.owner, self.device_id = ptr, size, owner, device_id


class MemoryPointer:
    """A place in a memory."""

    def __init__(self, mem: UnownedMemory, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset


class ndarray:
    """An array on a device: a new one, or (`memptr`) what somebody else's memory holds."""

    space: ClassVar[Space]
    queues: ClassVar[Queues]

    def __init__(self, shape: Shape, dtype: npt.DTypeLike = float, memptr: MemoryPointer | None = None) -> None:
        shape, dtype = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
        num_bytes = math.prod(shape) * dtype.itemsize
        if memptr is not None:
            data, self._owner = self.space.bytes_at(memptr.ptr, num_bytes), memptr
            device = memptr.mem.device_id
        elif num_bytes == 0:  # has no memory
            data, self._owner, device = np.empty(0, np.uint8), None, self.queues.device
        else:
            device = self.queues.device
            self.queues.check_unsafe("taking memory")
            self._owner = self.space.take(num_bytes, dtype.itemsize, device)
            data = self.space.bytes_at(self._owner.address, num_bytes)
        self._show(data.view(dtype).reshape(shape), device)

    _owner: Any

    def _show(self, values: Array, device: int) -> None:
        self._values, self.device = values, SimpleNamespace(id=device)
        self.shape, self.dtype, self.size = values.shape, values.dtype, values.size
        self.ndim, self.nbytes, self.strides = values.ndim, values.nbytes, values.strides
        self.data = SimpleNamespace(ptr=values.ctypes.data if self._owner is not None else 0)

    def _of(self, values: Array) -> Self:
        """What other values in the same memory look like."""
        array = type(self).__new__(type(self))
        array._owner = self._owner
        array._show(values, self.device.id)
        return array

    @classmethod
    def of_interface(cls, x: Any) -> Self:
        """The memory that `__cuda_array_interface__` describes."""
        interface = x.__cuda_array_interface__
        shape, dtype, strides = interface["shape"], np.dtype(interface["typestr"]), interface.get("strides")
        if math.prod(shape) == 0:
            return cls(shape, dtype)
        address = interface["data"][0]
        array = cls.__new__(cls)
        array._owner = x
        reach = math.prod(shape) * dtype.itemsize
        if strides is not None:
            reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + dtype.itemsize
        data = cls.space.bytes_at(address, reach)
        array._show(np.ndarray(shape, dtype, data, strides=strides), cls.space.device_of(address))
        return array

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        contiguous = self._values.flags.c_contiguous
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.data.ptr, False),
            "strides": None if contiguous else self.strides,
            "version": 3,
        }

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("an array on a device does not become a NumPy array by itself: use .get() or asnumpy")

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: Any) -> Self:
        part = self._values[key]
        if not isinstance(part, np.ndarray):  # a single element
            part = self._values[(*(key if isinstance(key, tuple) else (key,)), ...)]
        return self._same(part, f"[{key!r}]")

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(value, ndarray):
            source = value._here()
            self[key]._fill(lambda: source, [source])
        else:
            constant = np.array(value)
            self[key]._fill(lambda: constant)

    def view(self, dtype: npt.DTypeLike) -> Self:
        return self._of(self._values.view(dtype))

    def reshape(self, *shape: Any) -> Self:
        return self._same(self._values.reshape(*shape), f".reshape{shape}")

    def _same(self, values: Array, what: str) -> Self:
        """Others in the same memory; what NumPy would copy is not in the stand-in."""
        if values.size and not np.may_share_memory(values, self._values):
            raise NotImplementedError(f"an array of shape {list(self.shape)} is not copied by {what} in the stand-in")
        return self._of(values)

    def get(self) -> Array:
        """A copy on the host."""
        self.queues.wait_for_stream(self.queues.stream)
        return self._values.copy()

    def _fill(self, source: Callable[[], Any], read: Sequence[Array] = ()) -> None:
        """Write what `source` gives when the current stream comes to it, from the arrays `read` on the device.

        Like a graph of CUDA's the step holds no memory: what was let go before a replay is found.
        """
        values, space = self._values, self.space

        def write() -> None:
            for run in (run for array in (values, *read) for run in _runs(array)):
                space.bytes_at(*run)
            values[...] = source()
            for run in _runs(values):
                space.wrote(*run)

        self.queues.enqueue(self.queues.stream, write)

    def _here(self) -> Array:
        """The values, for work of the current device."""
        if self.device.id != self.queues.device:
            raise ValueError(f"an array of device {self.device.id} is used on the current device {self.queues.device}")
        return self._values


def _runs(values: Array) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the contiguous parts of an array."""
    if values.size == 0:
        return
    if values.flags.c_contiguous:
        yield values.ctypes.data, values.nbytes
    else:
        for i in range(len(values)):
            yield from _runs(values[i, ...])


class Makers:
    """CuPy's functions that make arrays, on the current device."""

    def __init__(self, kind: type[ndarray]) -> None:
        self._kind = kind

    def empty(self, shape: Shape, dtype: npt.DTypeLike = float) -> ndarray:
        """Memory as it is found."""
        return self._kind(shape, dtype)

    def zeros(self, shape: Shape, dtype: npt.DTypeLike = float) -> ndarray:
        array = self._kind(shape, dtype)
        array._fill(lambda: 0)
        return array

    def asarray(self, x: Any) -> ndarray:
        """x itself if it is on the current device; NumPy's arrays are copied there."""
        if isinstance(x, ndarray):
            self._own(x)._here()
            return x
        if hasattr(x, "__cuda_array_interface__"):
            return self._kind.of_interface(x)
        self._kind.queues.wait_for_stream(self._kind.queues.stream)  # a copy from memory that is not page-locked waits
        constant = np.array(x)
        array = self._kind(constant.shape, constant.dtype)
        array._fill(lambda: constant)
        return array

    def asnumpy(self, x: ndarray) -> Array:
        return x.get()

    def ascontiguousarray(self, x: ndarray) -> ndarray:
        values = self._own(x)._here()
        if values.flags.c_contiguous:
            return x
        array = self._kind(values.shape, values.dtype)
        array._fill(lambda: values, [values])
        return array

    def stack(self, arrays: Sequence[ndarray]) -> ndarray:
        parts = [self._own(array)._here() for array in arrays]
        stacked = self._kind((len(parts), *parts[0].shape), parts[0].dtype)
        stacked._fill(lambda: np.stack(parts), parts)
        return stacked

    def _own(self, x: ndarray) -> ndarray:
        """x itself, if its memory is that of this stand-in's devices."""
        if x.space is not self._kind.space:
            raise ValueError("x must be an array of this stand-in for CuPy, got one of another, which may have ended")
        return x

    def from_dlpack(self, x: Any) -> NoReturn:
        raise NotImplementedError(f"the stand-in takes no DLPack: give {type(x).__name__} a __cuda_array_interface__")
