"""A stand-in for libcuda, called as ctypes calls it: tensor maps, the capture's mode and what errors mean."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ...gpu.libcuda import MAP_ALIGNMENT, MAP_BYTES
from ..tensor_map import MAX_RANK, TensorMap
from .queues import Queues

SUCCESS, INVALID_VALUE, NOT_SUPPORTED = 0, 1, 801  # CUresult
MEANINGS = {SUCCESS: b"no error", INVALID_VALUE: b"invalid argument", NOT_SUPPORTED: b"operation not supported"}
FIRST_WITH_MAPS = (9, 0)


class DriverLibrary:
    """What `ctypes.CDLL` would give."""

    def __init__(self, queues: Queues, capability: tuple[int, int]) -> None:
        self._queues, self._capability = queues, capability
        self.refused = ""  # the rule that the last refused map broke: the driver does not tell

    def cuTensorMapEncodeTiled(
        self, tensor_map: Any, data_type: Any, rank: Any, address: Any, sizes: Any, strides: Any, box: Any, steps: Any,
        interleave: Any, swizzle: Any, l2: Any, fill: Any,
    ) -> int:  # fmt: skip
        """Write a map as the machine reads it (tensor_map.py); INVALID_VALUE if a rule of the driver is broken."""
        if self._capability < FIRST_WITH_MAPS:
            return NOT_SUPPORTED
        place, dimensions = tensor_map.value or 0, rank.value
        if place == 0 or place % MAP_ALIGNMENT:
            return self._refuse(f"tensorMap must be a multiple of {MAP_ALIGNMENT}, got {place:#x}")
        if not 1 <= dimensions <= MAX_RANK:  # before the arrays of that length are read
            return self._refuse(f"tensorRank must be in [1, {MAX_RANK}], got {dimensions}")
        try:
            encoded = TensorMap(
                data_type=data_type.value, address=address.value or 0, sizes=sizes[:dimensions],
                strides=strides[: dimensions - 1], box=box[:dimensions], steps=steps[:dimensions],
                interleave=interleave.value, swizzle=swizzle.value, l2=l2.value, fill=fill.value,
            )  # fmt: skip
        except ValueError as error:
            return self._refuse(str(error))
        ctypes.memmove(place, np.ascontiguousarray(encoded.words()).ctypes.data, MAP_BYTES)
        return SUCCESS

    def _refuse(self, rule: str) -> int:
        self.refused = rule
        return INVALID_VALUE

    def cuGetErrorString(self, code: int, text: Any) -> int:
        if code not in MEANINGS:
            return INVALID_VALUE
        ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = MEANINGS[code]
        return SUCCESS

    def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        """Set this thread's mode, and leave the one so far in its place."""
        place = ctypes.cast(mode, ctypes.POINTER(ctypes.c_int))
        place[0] = self._queues.exchange_mode(place[0])
        return SUCCESS
