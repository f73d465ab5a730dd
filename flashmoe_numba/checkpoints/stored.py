"""A tensor of weights as numbers, whatever it is stored as: floats, or a few bits and their scales."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from reference.arrays import Array
from reference.formats import DTYPES

from . import fp8, mxfp4
from .tensor_file import TensorInfo

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
assert set(FLOATS.values()) == set(DTYPES)


class Source(Protocol):
    """Where tensors are: a `Folder`, or a `State`. Both say what they have before anything is read."""

    bytes_read: int

    @property
    def names(self) -> Set[str]: ...

    def where(self, name: str) -> str: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str, piece: int, num_pieces: int) -> Array: ...


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor of numbers.

    Args:
        name: of the tensor, or of the one with its elements.
        shape: of the numbers.
        dtype: the number format it is stored in; None: quantised.
        read: piece `i` of `n` equal ones along the first axis, in a type that holds all its numbers.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    read: Callable[[int, int], Array]


def stored(source: Source, name: str, block: tuple[int, int] = fp8.BLOCK) -> Stored:
    """The tensor of that name.

    Args:
        block: rows and columns of a block of 8-bit weights.

    Raises:
        ValueError: its type is none of weights, or its scales are missing or misshapen; names it and its file.
    """
    info = source.info(name)
    if info.dtype == "U8" and name.endswith(mxfp4.BLOCKS):
        return _mxfp4(source, name, info)
    if info.dtype in fp8.TYPES:
        return _fp8(source, name, info, block)
    if info.dtype not in FLOATS:
        known = ", ".join([*FLOATS, *fp8.TYPES, f"or MXFP4 (U8, *{mxfp4.BLOCKS})"])
        raise ValueError(f"{source.where(name)}: tensor {name!r} must be of dtype {known}; got {info.dtype}")

    def read(piece: int, num_pieces: int) -> Array:
        return source.read(name, piece, num_pieces)

    return Stored(name=name, shape=info.shape, dtype=FLOATS[info.dtype], read=read)


def _fp8(source: Source, name: str, info: TensorInfo, block: tuple[int, int]) -> Stored:
    scale = _scales(source, name, fp8.SCALE_TYPES)
    if len(info.shape) < 2:
        raise ValueError(f"{source.where(name)}: tensor {name!r} must be a matrix in 8 bits, got {list(info.shape)}")
    shape = source.info(scale).shape
    single = all(n == 1 for n in shape)
    if not single:
        check_shape(source, scale, shape, fp8.scale_shape(info.shape, block))

    def read(piece: int, num_pieces: int) -> Array:
        scales = source.read(scale, *(0, 1) if single else (piece, num_pieces))
        return fp8.dequantise(source.read(name, piece, num_pieces), scales, block)

    return Stored(name=name, shape=info.shape, dtype=None, read=read)


def _mxfp4(source: Source, name: str, info: TensorInfo) -> Stored:
    scale = _scales(source, name, mxfp4.SCALE_TYPES)
    shape = source.info(scale).shape
    check_shape(source, name, info.shape, (*shape, mxfp4.BLOCK // 2))

    def read(piece: int, num_pieces: int) -> Array:
        scales = source.read(scale, piece, num_pieces).view(np.uint8)
        return mxfp4.dequantise(source.read(name, piece, num_pieces), scales)

    return Stored(name=name, shape=(*shape[:-1], shape[-1] * mxfp4.BLOCK), dtype=None, read=read)


def companions(name: str) -> list[str]:
    """What the scales of a quantised tensor may be called."""
    if name.endswith(mxfp4.BLOCKS):
        return [name.removesuffix(mxfp4.BLOCKS) + mxfp4.SCALES]
    return [f"{name}_scale_inv", *([name.removesuffix("weight") + "scale"] if name.endswith("weight") else [])]


def check_shape(source: Source, name: str, got: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Nothing, if a tensor is of the shape that it should be; else a ValueError that names it and its file."""
    if got != wanted:
        raise ValueError(f"{source.where(name)}: tensor {name!r} must have shape {list(wanted)}, got {list(got)}")


def _scales(source: Source, name: str, types: tuple[str, ...]) -> str:
    """The tensor with the scales of `name`."""
    scale = next((scale for scale in companions(name) if scale in source.names), None)
    if scale is None:
        rule = f"needs its scales, {' or '.join(companions(name))}, which are missing"
        raise ValueError(f"{source.where(name)}: tensor {name!r} {rule}")
    if source.info(scale).dtype not in types:
        rule = f"must be of dtype {' or '.join(types)}, got {source.info(scale).dtype}"
        raise ValueError(f"{source.where(scale)}: tensor {scale!r} {rule}")
    return scale
