"""Activations of rows of sums, and their slopes, on CPUs: registers the overloads, and one loop for each kind, which is
vectorised.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from reference.activations.exponential import make_exp

from ..device.compilation import jit
from ..device.cpu import PART_OPTIONS, part
from ..device.vocabulary import load, store
from .activations import BY_INDEX, FORMULAS, SLOPES_BY_INDEX

# A formula is more than LLVM inlines by itself, and no loop around a call is vectorised.
_INLINED = PART_OPTIONS | {"forceinline": True}
_inlined = partial(part, forceinline=True)


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


for _verb, _make in FORMULAS:
    _register(_verb, _make)


def _loops(kinds):
    """Of `columns` sums from `at` on, in their place: a loop for each of these kinds, and nothing for others."""
    if not kinds:
        return jit(lambda sums, at, columns, activation: None)
    (index, verb), *others = kinds
    rest = _loops(others)

    @jit
    def activate(sums, at, columns, activation):
        if activation == index:
            for c in range(at, at + columns):
                store(sums, c, verb(load(sums, c)))
        else:
            rest(sums, at, columns, activation)

    return activate


activate, activate_slope = _loops(BY_INDEX), _loops(SLOPES_BY_INDEX)
