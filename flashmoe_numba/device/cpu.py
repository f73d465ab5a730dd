"""The vocabulary compiled for CPUs: a block is one OS thread with one lane, atomics are LLVM atomics.

Importing this module registers the overloads. A poll backs off in three steps (spin, yield, sleep), because there may
be many more blocks than cores.
"""

from __future__ import annotations

import time
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array, populate_array

from . import vocabulary as verbs
from .parts import EntryCompiler, PartCompiler, as_part

# Kernel code allocates nothing, so it needs no reference counts: without them it compiles in a third of the time.
JIT_OPTIONS = {"nogil": True, "error_model": "numpy", "_nrt": False}
ENTRY_OPTIONS = JIT_OPTIONS | {"no_cfunc_wrapper": True, "pipeline_class": EntryCompiler}
# Of functions that only kernels call. What is not said here Numba takes from the caller's options.
NO_WRAPPERS = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
PART_OPTIONS = JIT_OPTIONS | NO_WRAPPERS | {"forceinline": False, "pipeline_class": PartCompiler}

SPINS, YIELDS = 64, 128
# Only who sleeps gives its core to all that wait for one: a yield passes it on within the process, or less (on Linux,
# within the session). So until some sleeps are over, ranks that share the cores may not have had their turn.
SETTLED_POLLS = SPINS + YIELDS + 6
SHORTEST_SLEEP_US, LONGEST_SLEEP_US = 100, 1000  # shorter ones interrupt, again and again, the ranks that compute

_sched_yield = types.ExternalFunction("sched_yield", types.int32())
_usleep = types.ExternalFunction("usleep", types.int32(types.uint32))


def part(function: Any, **options: Any) -> Any:
    """A function that only kernels call, compiled when the first one is."""
    return as_part(njit(**PART_OPTIONS | options)(function))


def element_pointer(context, builder, array_type, array, index):
    """LLVM pointer to `array[index]` of a C-contiguous array."""
    return builder.gep(make_array(array_type)(context, builder, array).data, [index])


def _word_intrinsic(num_values, returns_word, emit):
    """Intrinsic `f(words, i, *values)` on one array element; `emit(builder, pointer, bytes, values)` makes its code."""

    def signature(words):
        return (words.dtype if returns_word else types.void)(words, types.intp, *[words.dtype] * num_values)

    def codegen(context, builder, sig, args):
        pointer = element_pointer(context, builder, sig.args[0], args[0], args[1])
        result = emit(builder, pointer, sig.args[0].dtype.bitwidth // 8, args[2:])
        return result if returns_word else context.get_dummy_value()

    if num_values == 0:
        return intrinsic(lambda typing, words, i: (signature(words), codegen))
    if num_values == 1:
        return intrinsic(lambda typing, words, i, value: (signature(words), codegen))
    return intrinsic(lambda typing, words, i, expected, value: (signature(words), codegen))


_ld_acquire = _word_intrinsic(0, True, lambda b, p, size, v: b.load_atomic(p, "acquire", size))
_ld_relaxed = _word_intrinsic(0, True, lambda b, p, size, v: b.load_atomic(p, "monotonic", size))
_st_release = _word_intrinsic(1, False, lambda b, p, size, v: b.store_atomic(v[0], p, "release", size))
_fetch_add = _word_intrinsic(1, True, lambda b, p, size, v: b.atomic_rmw("add", p, v[0], "acq_rel"))
_cas = _word_intrinsic(2, True, lambda b, p, size, v: b.extract_value(b.cmpxchg(p, *v, "acq_rel", "acquire"), 0))


@intrinsic
def get(typing, array, i):
    """`array[i]` without Numba's wrap-around of negative indices, which keeps loops from being vectorised."""

    def codegen(context, builder, sig, args):
        return builder.load(element_pointer(context, builder, sig.args[0], args[0], args[1]))

    return array.dtype(array, types.intp), codegen


@intrinsic
def put(typing, array, i, value):
    """`array[i] = value`, likewise; the value has the element type."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], element_pointer(context, builder, sig.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), codegen


@intrinsic
def _spin(typing):
    def codegen(context, builder, sig, args):
        if context.target_data and "x86_64" in builder.module.triple:
            pause = builder.module.declare_intrinsic("llvm.x86.sse2.pause", fnty=ir.FunctionType(ir.VoidType(), []))
            builder.call(pause, [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _monotonic_ns(typing):
    i64 = ir.IntType(64)

    def codegen(context, builder, sig, args):
        timespec = ir.LiteralStructType([i64, i64])
        slot = builder.alloca(timespec)
        signature = ir.FunctionType(ir.IntType(32), [ir.IntType(32), timespec.as_pointer()])
        name = "clock_gettime"
        function = builder.module.globals.get(name) or ir.Function(builder.module, signature, name)
        builder.call(function, [ir.Constant(ir.IntType(32), time.CLOCK_MONOTONIC), slot])
        value = builder.load(slot)
        seconds = builder.mul(builder.extract_value(value, 0), ir.Constant(i64, 1_000_000_000))
        return builder.add(seconds, builder.extract_value(value, 1))

    return types.int64(), codegen


@intrinsic
def _array_at(typing, address, num_elements, like):
    array_type = types.Array(like.dtype, 1, "C")

    def codegen(context, builder, sig, args):
        array = make_array(array_type)(context, builder)
        item = context.get_constant(types.intp, array_type.dtype.bitwidth // 8)
        data = builder.inttoptr(args[0], array.data.type)
        populate_array(array, data, [args[1]], [item], item, None)
        return array._getvalue()

    return array_type(types.uint64, types.intp, like), codegen


def _write_float_control(mxcsr, fpcr):
    """Intrinsic that makes this thread round to nearest and mask exceptions, with the words of x86-64 and of Arm."""

    def codegen(context, builder, sig, args):
        i32, i64, byte_pointer = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
        declare, triple = builder.module.declare_intrinsic, builder.module.triple
        if triple.startswith("x86_64"):
            slot = alloca_once(builder, i32)  # of the function: one in a loop would take more of the stack at each turn
            builder.store(ir.Constant(i32, mxcsr), slot)
            load = declare("llvm.x86.sse.ldmxcsr", fnty=ir.FunctionType(ir.VoidType(), [byte_pointer]))
            builder.call(load, [builder.bitcast(slot, byte_pointer)])
        elif triple.startswith(("aarch64", "arm64")):
            write = declare("llvm.aarch64.set.fpcr", fnty=ir.FunctionType(ir.VoidType(), [i64]))
            builder.call(write, [ir.Constant(i64, fpcr)])
        return context.get_dummy_value()

    return intrinsic(lambda typing: (types.void(), codegen))


keep_denormals = _write_float_control(0x1F80, 0)  # what a process starts with
flush_denormals = _write_float_control(0x9FC0, 1 << 24)  # those that are read and those that are made are zeros


@njit(**ENTRY_OPTIONS)
def reset_float_control():
    """Make this thread round and keep denormals as any does; it inherits from the one that started it.

    So what a caller set there, flush-to-zero say, changes no bit of a block that runs in a thread of its own.
    """
    keep_denormals()


def half_to_float(builder, bits):
    """float16 bits -> float (LLVM values, scalar or vector)."""
    half, single = ir.HalfType(), ir.FloatType()
    if isinstance(bits.type, ir.VectorType):
        half, single = ir.VectorType(half, bits.type.count), ir.VectorType(single, bits.type.count)
    return builder.fpext(builder.bitcast(bits, half), single)


def bfloat_to_float(builder, bits):
    """bfloat16 bits -> float (LLVM values, scalar or vector)."""
    word, single, shift = ir.IntType(32), ir.FloatType(), 16
    if isinstance(bits.type, ir.VectorType):
        count = bits.type.count
        word, single, shift = ir.VectorType(word, count), ir.VectorType(single, count), [16] * count
    return builder.bitcast(builder.shl(builder.zext(bits, word), ir.Constant(word, shift)), single)


@intrinsic
def from_half(typing, bits):
    return types.float32(types.uint16), lambda context, builder, sig, args: half_to_float(builder, args[0])


@intrinsic
def _from_bfloat(typing, bits):
    return types.float32(types.int16), lambda context, builder, sig, args: bfloat_to_float(builder, args[0])


@intrinsic
def to_half(typing, value):
    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def _to_bfloat(typing, value):
    i32 = ir.IntType(32)

    def constant(value):
        return ir.Constant(i32, value)

    def codegen(context, builder, sig, args):
        bits = builder.bitcast(args[0], i32)
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.lshr(builder.add(bits, builder.add(constant(0x7FFF), odd)), constant(16))
        # Rounding the bits of a NaN could make an infinity, so they are cut, and kept a NaN by the quiet bit.
        quiet_nan = builder.or_(builder.lshr(bits, constant(16)), constant(0x40))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        return builder.trunc(builder.select(is_nan, quiet_nan, rounded), ir.IntType(16))

    return types.int16(types.float32), codegen


def _meaning(stub, **options):
    return overload(stub, target="cpu", jit_options=PART_OPTIONS | options)


_meaning(verbs.lane)(lambda: lambda: 0)
_meaning(verbs.lanes)(lambda: lambda: 1)
_meaning(verbs.block_sync)(lambda: lambda: None)
_meaning(verbs.ld_acquire)(lambda words, i: lambda words, i: _ld_acquire(words, i))
_meaning(verbs.ld_relaxed)(lambda words, i: lambda words, i: _ld_relaxed(words, i))
_meaning(verbs.st_release)(lambda words, i, value: lambda words, i, value: _st_release(words, i, value))
_meaning(verbs.fetch_add)(lambda words, i, value: lambda words, i, value: _fetch_add(words, i, value))
_meaning(verbs.cas)(lambda words, i, expected, value: lambda words, i, expected, value: _cas(words, i, expected, value))
_meaning(verbs.send_put)(lambda wire, put: lambda wire, put: False)
_meaning(verbs.acquire_told)(lambda wire, words, i: lambda wire, words, i: _ld_acquire(words, i))
_meaning(verbs.push_control)(lambda wire, remote, every_ns: lambda wire, remote, every_ns: None)
_meaning(verbs.now)(lambda: lambda: _monotonic_ns())
_meaning(verbs.array_at, _nrt=True)(  # Numba lets no other function return an array of its own making
    lambda address, num_elements, like: lambda address, num_elements, like: _array_at(address, num_elements, like)
)


@_meaning(verbs.pause)
def _pause(attempt):
    def meaning(attempt):
        if attempt < SPINS:
            _spin()
        elif attempt < SPINS + YIELDS:
            _sched_yield()
        else:
            _usleep(types.uint32(min(SHORTEST_SLEEP_US * (attempt - SPINS - YIELDS + 1), LONGEST_SLEEP_US)))
        return attempt + 1

    return meaning


_meaning(verbs.has_settled)(lambda attempt: lambda attempt: attempt >= SETTLED_POLLS)


@_meaning(verbs.load)
def _load(array, i):
    if array.dtype == types.uint16:
        return lambda array, i: from_half(get(array, i))
    if array.dtype == types.int16:
        return lambda array, i: _from_bfloat(get(array, i))
    return lambda array, i: get(array, i)


@_meaning(verbs.store)
def _store(array, i, value):
    if array.dtype == types.uint16:
        return lambda array, i, value: put(array, i, to_half(value))
    if array.dtype == types.int16:
        return lambda array, i, value: put(array, i, _to_bfloat(value))
    return lambda array, i, value: put(array, i, value)


@_meaning(verbs.copy_row)
def _copy_row(target, target_at, source, source_at, num_elements):
    def meaning(target, target_at, source, source_at, num_elements):
        for c in range(num_elements):
            put(target, target_at + c, get(source, source_at + c))

    return meaning


# All columns in one go, in the block's working memory: the loops are then those of whole rows, and become vectors.
_meaning(verbs.part_columns)(lambda target, source, num_columns: lambda target, source, num_columns: num_columns)


@_meaning(verbs.zero_sums, _nrt=True)  # it gives an array back, as array_at does
def _zero_sums(working, num_sums):
    def meaning(working, num_sums):
        for c in range(num_sums):
            put(working, c, working.dtype.type(0))
        return working

    return meaning


@_meaning(verbs.add_part)
def _add_part(sums, num_sums, source, source_at, weight):
    def meaning(sums, num_sums, source, source_at, weight):
        for c in range(num_sums):
            put(sums, c, get(sums, c) + weight * verbs.load(source, source_at + c))

    return meaning


@_meaning(verbs.scale_part)
def _scale_part(sums, num_sums, scale, scale_at):
    def meaning(sums, num_sums, scale, scale_at):
        for c in range(num_sums):
            put(sums, c, get(sums, c) * get(scale, scale_at + c))

    return meaning


@_meaning(verbs.store_part)
def _store_part(target, target_at, sums, num_sums):
    def meaning(target, target_at, sums, num_sums):
        for c in range(num_sums):
            verbs.store(target, target_at + c, get(sums, c))

    return meaning
