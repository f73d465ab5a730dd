"""One .safetensors file: what its header says, and bytes of its tensors.

The format (https://github.com/huggingface/safetensors#format): eight bytes with the header's length, the header (JSON:
each tensor's dtype, shape and where it lies), and the tensors, without holes. A file comes from anywhere, so nothing of
its header is believed before it fits the file. Pieces of tensors are read by their offsets, and the file is not mapped:
so no page of it is counted as this process's memory, and a file that is cut off meanwhile is an error, not a SIGBUS.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reference.arrays import Array
from reference.formats import element_dtype
from reference.scalars import is_whole

MOST_HEADER_BYTES = 100_000_000  # as in the format's own library
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}
NUMPY_NAMES = {"U8": "uint8", "I32": "int32", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64"}
NUMPY_NAMES |= {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}


def array_dtype(numpy_name: str) -> np.dtype[Any]:
    """NumPy's type of that name; those that NumPy does not know come from ml_dtypes."""
    if numpy_name.startswith("float8"):
        import ml_dtypes

        extended: np.dtype[Any] = np.dtype(getattr(ml_dtypes, numpy_name))
        return extended
    return element_dtype(numpy_name)


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a header says of one tensor.

    Args:
        dtype: as the format writes it; a key of BITS.
        begin, end: its bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A file that is read from; its header is read and checked when it is opened.

    Raises:
        FileNotFoundError: there is none; ValueError: it is not whole, or not such a file: names it and what is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        try:
            self.tensors = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read_into(self, target: Array, offset: int) -> None:
        """Fill a contiguous array with the file's bytes from `offset` on."""
        if not target.size:
            return
        view, done = target.reshape(-1).view(np.uint8).data, 0
        while done < len(view):
            got = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if not got:
                raise self._wrong(f"ends at byte {offset + done:,}, inside a tensor: it became shorter")
            done += got

    def _read_header(self) -> dict[str, TensorInfo]:
        size = os.fstat(self._file.fileno()).st_size
        prefix = np.empty(1, "<u8")
        if size < prefix.nbytes:
            raise self._wrong(f"must have at least {prefix.nbytes} bytes, got {size}")
        self.read_into(prefix, 0)
        length, most = int(prefix[0]), min(MOST_HEADER_BYTES, size - prefix.nbytes)
        if length > most:
            raise self._wrong(f"must have a header of at most {most:,} bytes, got {length:,}: cut off?")
        header = np.empty(length, np.uint8)
        self.read_into(header, prefix.nbytes)
        return self._check_header(header.tobytes(), prefix.nbytes + length, size)

    def _check_header(self, header: bytes, payload: int, size: int) -> dict[str, TensorInfo]:
        try:
            table = json.loads(header, object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._wrong(f"must have a header in JSON: {error}") from None
        if not isinstance(table, dict):
            raise self._wrong(f"must have a JSON object as header, got a {type(table).__name__}")
        table.pop("__metadata__", None)
        tensors = {name: self._check_tensor(name, entry, payload) for name, entry in table.items()}
        self._check_places(tensors, payload, size)
        return tensors

    def _check_tensor(self, name: str, entry: Any, payload: int) -> TensorInfo:
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
            raise self._wrong(f"tensor {name!r} must have dtype, shape and data_offsets, got {str(entry)[:80]}")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in BITS:
            raise self._wrong(f"tensor {name!r} must have a dtype of {', '.join(BITS)}; got {dtype!r}")
        for what, numbers in (("shape", shape), ("data_offsets", offsets)):
            if not isinstance(numbers, list) or not all(is_whole(n) and 0 <= n < 2**63 for n in numbers):
                raise self._wrong(f"tensor {name!r} must have a {what} of numbers >= 0, got {str(numbers)[:80]}")
        num_bytes, rest = divmod(math.prod(shape) * BITS[dtype], 8)
        if rest or len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
            rule = f"{num_bytes:,} bytes for {dtype} of shape {shape}"
            raise self._wrong(f"tensor {name!r} must have {rule}, got data_offsets {offsets}")
        return TensorInfo(dtype=dtype, shape=tuple(shape), begin=payload + offsets[0], end=payload + offsets[1])

    def _check_places(self, tensors: dict[str, TensorInfo], payload: int, size: int) -> None:
        """Tensors lie one after the other, up to the file's end."""
        at = payload
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
            if info.end > size:
                raise self._wrong(f"tensor {name!r} must end by byte {size:,}, as the file does, got {info.end:,}")
            if info.begin != at:
                raise self._wrong(f"tensor {name!r} must begin at byte {at:,}, behind the last, got {info.begin:,}")
            at = info.end
        if at != size:
            raise self._wrong(f"must end with its last tensor at byte {at:,}, got {size:,} bytes")

    def _wrong(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return table
