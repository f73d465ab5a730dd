"""Activations of rows of sums on CPUs: registers the overloads, and one loop for each kind, which is vectorised."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from ..device.compilation import jit
from ..device.cpu import JIT_OPTIONS
from ..device.vocabulary import load, store
from .activations import GELU, RELU, SILU, gelu, silu
from .formulas import make_exp, make_gelu, make_silu

# A formula is more than LLVM inlines by itself, and no loop around a call is vectorised.
_INLINED = JIT_OPTIONS | {"forceinline": True}
_inlined = njit(**_INLINED, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _bitcast(source, target, llvm_type):
    @intrinsic
    def cast(typing, value):
        return target(source), lambda context, builder, sig, args: builder.bitcast(args[0], llvm_type)

    return cast


exp32 = make_exp(
    np.float32, _inlined, _bitcast(types.float32, types.int32, ir.IntType(32)),
    _bitcast(types.int32, types.float32, ir.FloatType()),
)  # fmt: skip
exp64 = make_exp(
    np.float64, _inlined, _bitcast(types.float64, types.int64, ir.IntType(64)),
    _bitcast(types.int64, types.float64, ir.DoubleType()),
)  # fmt: skip


def _register(verb, make):
    single, double = make(np.float32, _inlined, exp32), make(np.float64, _inlined, exp64)

    @overload(verb, target="cpu", jit_options=_INLINED)
    def _meaning(x):
        return (lambda x: double(x)) if x == types.float64 else (lambda x: single(x))


_register(silu, make_silu)
_register(gelu, make_gelu)


@jit
def activate(sums, at, columns, activation):
    """The activation of `columns` sums from `at` on."""
    if activation == RELU:
        for c in range(at, at + columns):
            x = load(sums, c)
            store(sums, c, x if not x < 0 else sums.dtype.type(0))
    elif activation == SILU:
        for c in range(at, at + columns):
            store(sums, c, silu(load(sums, c)))
    elif activation == GELU:
        for c in range(at, at + columns):
            store(sums, c, gelu(load(sums, c)))
