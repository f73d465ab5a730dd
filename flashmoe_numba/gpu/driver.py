"""NVIDIA's driver asked directly, by ctypes: what GPUs there are, and which reach which.

Needs no package and makes no context. Every call can fail, on a machine without a driver as with a broken one: what
failed is said, never raised.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

LIBRARY = "libcuda.so.1"
NAME_BYTES = 256
MAJOR, MINOR = 75, 76  # CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR, _MINOR


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU.

    Args:
        memory_bytes: all of it.
        capability: (major, minor).
    """

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Driver:
    """What the driver says.

    Args:
        version: the newest CUDA it runs, (major, minor); None without a driver.
        devices: all that this process may use.
        peers: peers[i][j] says whether GPU i can read and write the memory of GPU j; True for itself.
        error: why the answer ends early; "" if it does not.
    """

    version: tuple[int, int] | None = None
    devices: tuple[Device, ...] = ()
    peers: tuple[tuple[bool, ...], ...] = ()
    error: str = ""


def ask_driver(library: str = LIBRARY) -> Driver:
    """What there is, as far as the driver answers."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        return Driver(error=str(error))
    version = None
    try:
        version = divmod(_integer(cuda, "cuDriverGetVersion") // 10, 100)
        _call(cuda, "cuInit", 0)
        indices = range(_integer(cuda, "cuDeviceGetCount"))
        devices = tuple(_device(cuda, index) for index in indices)
        peers = tuple(tuple(i == j or _reaches(cuda, i, j) for j in indices) for i in indices)
    except (_DriverError, AttributeError) as error:  # AttributeError: the library lacks a function
        return Driver(version=version, error=str(error))
    return Driver(version=version, devices=devices, peers=peers)


class _DriverError(Exception):
    """A call of the driver returned an error; the text names both."""


def _call(cuda: ctypes.CDLL, function: str, *arguments: object) -> None:
    code = getattr(cuda, function)(*arguments)
    if code:
        raise _DriverError(f"{function}: {meaning(cuda, code)}")


def meaning(cuda: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    try:
        cuda.cuGetErrorString(code, ctypes.byref(text))
    except AttributeError:
        text.value = None
    return f"{(text.value or b'unknown error').decode(errors='replace')} ({code})"


def _integer(cuda: ctypes.CDLL, function: str, *arguments: object) -> int:
    value = ctypes.c_int()
    _call(cuda, function, ctypes.byref(value), *arguments)
    return value.value


def _device(cuda: ctypes.CDLL, index: int) -> Device:
    handle = _integer(cuda, "cuDeviceGet", index)
    name, memory = ctypes.create_string_buffer(NAME_BYTES), ctypes.c_size_t()
    _call(cuda, "cuDeviceGetName", name, NAME_BYTES, handle)
    _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
    major, minor = (_integer(cuda, "cuDeviceGetAttribute", attribute, handle) for attribute in (MAJOR, MINOR))
    return Device(name=name.value.decode(errors="replace"), memory_bytes=memory.value, capability=(major, minor))


def _reaches(cuda: ctypes.CDLL, i: int, j: int) -> bool:
    handles = [_integer(cuda, "cuDeviceGet", index) for index in (i, j)]
    return bool(_integer(cuda, "cuDeviceCanAccessPeer", *handles))
