"""Kernel variants: what is compiled in. Everything else is a run-time argument."""

from __future__ import annotations

from dataclasses import dataclass

from reference import DTYPES, MoEConfig

from ..tile_gemm.hopper import INSTRUCTIONS
from ..tile_gemm.matrices import MAX_TILE_COLUMNS

HEAPS = ("ipc", "nvshmem")  # how peers' memory is reached: mapped here, or on other hosts by puts, too
ARCHITECTURES = {"sm_80": (8, 0), "sm_90a": (9, 0), "sm_100a": (10, 0)}
TMA_ALIGNMENT = 16  # bytes, of a row
TENSOR_DTYPES = tuple(INSTRUCTIONS)
BACKWARD = "-backward"  # ends the names of kernels of gradients


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One kernel.

    Args:
        dtype: elements, as in MoEConfig.
        architecture: one of ARCHITECTURES.
        tensor_cores: expert products by TMA and wgmma (hopper.py), else by multiply-adds of single lanes (lanes/).
            float32 elements are then multiplied as TF32.
        heap: one of HEAPS.
        backward: the kernel of gradients, which layers with `save` have besides.

    Raises:
        ValueError: there is no such variant.
    """

    dtype: str
    architecture: str
    tensor_cores: bool
    heap: str = HEAPS[0]
    backward: bool = False

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}; got {self.architecture!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if self.heap not in HEAPS:
            raise ValueError(f"heap must be one of {', '.join(HEAPS)}; got {self.heap!r}")
        if self.tensor_cores and self.architecture != "sm_90a":
            raise ValueError(f"tensor_cores need architecture sm_90a, got {self.architecture}")
        if self.tensor_cores and self.dtype not in TENSOR_DTYPES:
            raise ValueError(f"tensor_cores need a dtype of {', '.join(TENSOR_DTYPES)}; got {self.dtype}")

    @property
    def name(self) -> str:
        kind = {True: "tf32" if self.dtype == "float32" else "wgmma", False: "lanes"}[self.tensor_cores]
        heap = "" if self.heap == HEAPS[0] else f"-{self.heap}"
        return f"{self.architecture}-{self.dtype}-{kind}{heap}{BACKWARD if self.backward else ''}"


def has_tensor_cores(architecture: str, dtype: str) -> bool:
    """Is there a variant of these that uses them?"""
    return architecture == "sm_90a" and dtype in TENSOR_DTYPES


def choose_variant(config: MoEConfig, architecture: str, tf32: bool = False, heap: str = HEAPS[0]) -> Variant:
    """The fastest variant that can run this layer.

    TMA wants rows whose bytes are a multiple of 16, and the tile of tensor cores has 128 columns. float32 is rounded to
    TF32 only where that is asked for.
    """
    row_bytes = [columns * config.format.num_bytes for columns in (config.hidden, config.ffn, config.shared_ffn)]
    possible = (
        has_tensor_cores(architecture, config.dtype)
        and (config.dtype != "float32" or tf32)
        and all(num_bytes % TMA_ALIGNMENT == 0 for num_bytes in row_bytes)
        and config.tile_n == MAX_TILE_COLUMNS
    )
    return Variant(dtype=config.dtype, architecture=architecture, tensor_cores=possible, heap=heap)


def architecture_of(capability: tuple[int, int]) -> str:
    """The one of ARCHITECTURES that runs on a device of this compute capability.

    Raises:
        ValueError: there is none.
    """
    fitting = [name for name, needed in ARCHITECTURES.items() if needed[0] == capability[0] and needed <= capability]
    if not fitting:
        major, minor = capability
        raise ValueError(f"no kernel for compute capability {major}.{minor}: there are {', '.join(ARCHITECTURES)}")
    return fitting[-1]
