"""Arithmetics of the tile GEMM on CPUs: what the sum of an element's products is, to the last bit.

An arithmetic is a meaning. A CPU that has an instruction for it uses that; on others the same bits are made by ordinary
vector instructions. So a row has the same bits on all CPUs under one arithmetic, and others under another one:

- `fma`: one chain of fused multiply-adds in the order of the depth index.
- `pairs`: the same chain, but of each two indices the odd one comes first, and denormal numbers, read or made, are
  zeros.
- `tiles`: of each 32 indices the products of the 16 even ones are one chain from zero, those of the odd ones another,
  and their sum is added to the element's; denormal numbers are zeros, too.

The last two are what Intel's manual says of VDPBF16PS and TDPBF16PS (Software Developer's Manual, volume 2), for
bfloat16 summed in float32; where the depth ends within 32, zeros are multiplied. All round to nearest even, whatever
the control word says.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from typing import NamedTuple

from reference.scalars import check_name

from .panels import PairPanels, Panels, TilePanels

AUTO = "auto"
PAIRED_DTYPE = "bfloat16"  # what `pairs` and `tiles` multiply
_ARCH_REQ_XCOMP_PERM, _XTILEDATA, _SYS_ARCH_PRCTL = 0x1023, 18, 158  # Linux on x86-64


class Arithmetic(NamedTuple):
    """One arithmetic.

    Args:
        form: of the weights that are multiplied so.
        instruction: that does it; "" for one that needs none of its own.
        features: of LLVM's target that such a CPU has.
    """

    name: str
    form: type[Panels]
    instruction: str
    features: tuple[str, ...]


ARITHMETICS = {  # from the slowest where all are instructions
    row.name: row
    for row in (
        Arithmetic("fma", Panels, "", ()),
        Arithmetic("pairs", PairPanels, "vdpbf16ps", ("+avx512f", "+avx512bf16")),
        Arithmetic("tiles", TilePanels, "tdpbf16ps", ("+avx512f", "+amx-tile", "+amx-bf16")),
    )
}
NAMES = (AUTO, *ARITHMETICS)


@cache
def target_features() -> frozenset[str]:
    """Of what Numba compiles for: the host, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name another machine."""
    from numba.core.registry import cpu_target

    return frozenset(cpu_target.target_context.codegen().magic_tuple()[2].split(","))


def has_fused() -> bool:
    """Can this CPU multiply and add at once, as all but `fma` need?"""
    from llvmlite import binding

    return "+fma" in target_features() or "aarch64" in binding.get_process_triple()


def by_instruction(name: str) -> bool:
    """Is an arithmetic compiled to the instruction that does it?"""
    row = ARITHMETICS[name]
    return row.instruction != "" and target_features().issuperset(row.features)


@cache
def tiles_refused() -> str:
    """Why Linux does not let this process use the registers of AMX; "" if it does. The first call asks for them."""
    if sys.platform != "linux":
        return f"unknown on {sys.platform}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA) == 0:
        return ""
    number = ctypes.get_errno()
    return f"arch_prctl: {errno.errorcode.get(number, number)}, {os.strerror(number)}"


def why_not(name: str) -> str:
    """Why this process cannot multiply by an arithmetic; "" if it can."""
    if name == "tiles" and by_instruction(name) and tiles_refused():
        cure = "NUMBA_CPU_FEATURES without +amx-bf16 makes the same bits by other instructions"
        return f"the system refuses the registers of AMX ({tiles_refused()}); {cure}"
    return "" if name == "fma" or has_fused() else "this CPU has no fused multiply-add"


def fastest() -> str:
    """The arithmetic of bfloat16 that is meant by AUTO: the fastest that this CPU has an instruction for."""
    return [name for name in ARITHMETICS if name == "fma" or (by_instruction(name) and not why_not(name))][-1]


def choose(wanted: str, dtype: str) -> str:
    """The arithmetic of a layer's experts.

    Args:
        wanted: one of NAMES.
        dtype: of the layer's elements.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    check_name("arithmetic", wanted, NAMES)
    if dtype != PAIRED_DTYPE and wanted not in (AUTO, "fma"):
        raise ValueError(f"arithmetic {wanted!r} multiplies {PAIRED_DTYPE} only, and dtype is {dtype!r}")
    if dtype != PAIRED_DTYPE or wanted == "fma":
        return "fma"
    if wanted == AUTO:
        return fastest()
    if why_not(wanted):
        raise ValueError(f"arithmetic {wanted!r} cannot be used here: {why_not(wanted)}")
    return wanted
