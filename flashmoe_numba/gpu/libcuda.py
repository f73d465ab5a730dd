"""Two functions of NVIDIA's driver that CuPy does not offer, called by ctypes. The driver is loaded already by then."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

from .driver import LIBRARY, meaning

MAP_BYTES = 128
MAP_ALIGNMENT = 64  # bytes; the driver refuses to write a CUtensorMap elsewhere
ELEMENTS = {"uint16": (6, 2), "int16": (9, 2), "float32": (11, 4)}  # CUtensorMapDataType FLOAT16, BFLOAT16, TFLOAT32
INTERLEAVE_NONE, SWIZZLE_128B, L2_256B, FILL_ZEROS = 0, 3, 3, 0
CAPTURE_MODE_RELAXED = 2


def load() -> Any:
    return ctypes.CDLL(LIBRARY)


def encode_tensor_map(cuda: Any, element: str, address: int, shape: Sequence[int], box: Sequence[int]) -> bytes:
    """A CUtensorMap of a contiguous array for tiles with the 128-byte swizzle; what lies outside reads as zero.

    Args:
        cuda: the library.
        element: bit patterns of float16 ("uint16") or bfloat16 ("int16"), or "float32".
        shape, box: of the array and of a tile, the innermost dimension first.

    Raises:
        RuntimeError: what the driver refused.
    """
    kind, item = ELEMENTS[element]
    strides, num_bytes = [], item
    for length in shape[:-1]:
        num_bytes *= length
        strides.append(num_bytes)
    room = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    at = -ctypes.addressof(room) % MAP_ALIGNMENT
    code = cuda.cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(room) + at),
        ctypes.c_int(kind),
        ctypes.c_uint32(len(shape)),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * len(shape))(*shape),
        (ctypes.c_uint64 * len(strides))(*strides),
        (ctypes.c_uint32 * len(box))(*box),
        (ctypes.c_uint32 * len(box))(*[1] * len(box)),
        *map(ctypes.c_int, (INTERLEAVE_NONE, SWIZZLE_128B, L2_256B, FILL_ZEROS)),
    )
    if code:
        text = meaning(cuda, code)
        raise RuntimeError(f"cuTensorMapEncodeTiled refused shape {list(shape)}, box {list(box)}: {text}")
    return room.raw[at : at + MAP_BYTES]


@contextlib.contextmanager
def relaxed_capture(cuda: Any) -> Iterator[None]:
    """Let this thread take memory while a stream is being captured, which the stricter modes of a capture forbid."""
    mode = ctypes.c_int(CAPTURE_MODE_RELAXED)
    cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))  # leaves the mode so far in its place
    try:
        yield
    finally:
        cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
