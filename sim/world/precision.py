"""Bytes and MMA types of a layer's numbers: what moves, what is streamed and what the tensor cores multiply.

Sizes are bytes per element with the scales of narrow types included. Dispatch moves tokens in the type of the product;
combine moves results in bfloat16 where the product is narrower, because they are summed afterwards.
Leaves out: padding of scales to what a copy engine needs, and the time that quantising takes.
Source: DeepSeek-V3's fp8 (float32 scales: one per 128 elements of a row, one per 128 x 128 block of weights) and
DeepGEMM's tests/test_mega_moe.py for fp8xfp4 (one-byte scales, one per 32 elements); the microscaling formats of OCP
(mxfp8: a byte per 32 elements) and NVIDIA (nvfp4: a byte per 16).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from reference.formats import FORMATS
from reference.scalars import check_one_of, make_plain

from .checks import check_positive, check_text
from .machine_schema import MMA_TYPES

SIZES = ("weight_bytes", "token_bytes", "hidden_bytes", "result_bytes")


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Element sizes of one layer.

    Args:
        name: one of `PRECISIONS`, or a name of yours.
        mma_type: key of `Hardware.tflops` at whose rate the products run.
        weight_bytes: per element of the expert weights.
        token_bytes: per element that dispatch moves.
        hidden_bytes: per element between the two products.
        result_bytes: per element that combine moves.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """

    name: str
    mma_type: str
    weight_bytes: float
    token_bytes: float
    hidden_bytes: float
    result_bytes: float

    def __post_init__(self) -> None:
        make_plain(self)
        check_text("name", self.name)
        check_one_of("mma_type", self.mma_type, MMA_TYPES)
        for name in SIZES:
            check_positive(name, getattr(self, name))


def precision(name: str) -> Precision:
    """A precision by name.

    Raises:
        ValueError: no such precision; lists those there are.
    """
    check_one_of("precision", name, PRECISIONS)
    return _TABLE[name]


def _plain(name: str) -> Precision:
    """All of a layer in one format of `reference.formats`."""
    sizes = dict.fromkeys(SIZES, FORMATS[name].num_bytes)
    return Precision(name=name, mma_type=FORMATS[name].mma_type, **sizes)


def with_results(formats: Precision, name: str) -> Precision:
    """The same layer with results that travel as the tokens of the precision `name` do.

    Raises:
        ValueError: no such precision.
    """
    size = precision(name).token_bytes
    if size == formats.result_bytes:
        return formats
    return replace(formats, name=f"{formats.name}, {name} results", result_bytes=size)


def _scaled(name: str, weight_bytes: float, row_bytes: float, mma_type: str = "fp8") -> Precision:
    """Products at the rate of a narrow format; results are wider, because they are summed afterwards."""
    return Precision(
        name=name,
        mma_type=mma_type,
        weight_bytes=weight_bytes,
        token_bytes=row_bytes,
        hidden_bytes=row_bytes,
        result_bytes=FORMATS["bfloat16"].num_bytes,
    )


_MX_SCALE, _NV_SCALE = 1 / 32, 1 / 16

_TABLE = {name: _plain(name) for name in ("bfloat16", "float16", "float32", "float64")} | {
    "fp8": _scaled("fp8", weight_bytes=1 + 4 / 128**2, row_bytes=1 + 4 / 128),
    # fp8 rows times fp4 weights: the tensor cores run at the rate of the wider operand, so fp4 saves bytes and no
    # time. MegaMoE's best on B200 is 2438 TFLOPS: below the fp8 peak of 4500, and a quarter of fp4's 9000.
    "fp8xfp4": _scaled("fp8xfp4", weight_bytes=0.5 + _MX_SCALE, row_bytes=1 + _MX_SCALE),
    "mxfp8": _scaled("mxfp8", weight_bytes=1 + _MX_SCALE, row_bytes=1 + _MX_SCALE),
    "nvfp4": _scaled("nvfp4", weight_bytes=0.5 + _NV_SCALE, row_bytes=0.5 + _NV_SCALE, mma_type="fp4"),
}
PRECISIONS: tuple[str, ...] = tuple(_TABLE)
