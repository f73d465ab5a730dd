"""The vocabulary compiled for NVIDIA GPUs: a block is a thread block, atomics are PTX at system scope.

Importing this module registers the overloads. LLVM's own atomics are no way here: NVVM takes them down to relaxed ones
of one GPU.
"""

from __future__ import annotations

from . import cuda_network as _registers_the_network  # noqa: F401
from . import cuda_rows as _registers_elements_and_rows  # noqa: F401
from . import vocabulary as verbs
from .cuda_api import cgutils, cuda, element_pointer, intrinsic, ir, make_array, overload, populate_array, types
from .cuda_records import record_at

SHORTEST_SLEEP_NS, LONGEST_SLEEP_NS = 32, 1024
SETTLED_POLLS = 14  # some ten microseconds: packets that are sent together come within that (docs/simulator.md)
_REGISTER = {16: "h", 32: "r", 64: "l"}


def statement(ptx):
    """An intrinsic of no arguments that is these PTX instructions."""

    def codegen(context, builder, sig, args):
        builder.asm(ir.FunctionType(ir.VoidType(), []), ptx, "~{memory}", [], True)
        return context.get_dummy_value()

    return intrinsic(lambda typing: (types.void(), codegen))


def _word_intrinsic(num_values, returns_word, ptx):
    """Intrinsic `f(words, i, *values)` on one word; `$0, $1...` are the result if there is one, the address, values."""

    def signature(words):
        return (words.dtype if returns_word else types.void)(words, types.intp, *[words.dtype] * num_values)

    def codegen(context, builder, sig, args):
        pointer = element_pointer(context, builder, sig.args[0], args[0], args[1])
        word = context.get_value_type(sig.args[0].dtype)
        register = _REGISTER[word.width]
        outputs = [f"={register}"] if returns_word else []
        constraints = ",".join([*outputs, "l", *[register] * num_values, "~{memory}"])
        function = ir.FunctionType(word if returns_word else ir.VoidType(), [pointer.type, *[word] * num_values])
        result = builder.asm(function, ptx.format(bits=word.width), constraints, [pointer, *args[2:]], True)
        return result if returns_word else context.get_dummy_value()

    if num_values == 0:
        return intrinsic(lambda typing, words, i: (signature(words), codegen))
    if num_values == 1:
        return intrinsic(lambda typing, words, i, value: (signature(words), codegen))
    return intrinsic(lambda typing, words, i, expected, value: (signature(words), codegen))


_ld_acquire = _word_intrinsic(0, True, "ld.acquire.sys.b{bits} $0, [$1];")
_ld_relaxed = _word_intrinsic(0, True, "ld.relaxed.sys.b{bits} $0, [$1];")
_st_release = _word_intrinsic(1, False, "st.release.sys.b{bits} [$0], $1;")
_fetch_add = _word_intrinsic(1, True, "atom.add.acq_rel.sys.u{bits} $0, [$1], $2;")
_cas = _word_intrinsic(2, True, "atom.cas.acq_rel.sys.b{bits} $0, [$1], $2, $3;")


@intrinsic
def _global_timer(typing):
    def codegen(context, builder, sig, args):
        return builder.asm(ir.FunctionType(ir.IntType(64), []), "mov.u64 $0, %globaltimer;", "=l", [], True)

    return types.int64(), codegen


@intrinsic
def _lane(typing):
    """%tid.x, read anew each time: what follows from it is then not computed before all tasks and kept for them."""

    def codegen(context, builder, sig, args):
        return builder.asm(ir.FunctionType(ir.IntType(32), []), "mov.u32 $0, %tid.x;", "=r", [], True)

    return types.int32(), codegen


@intrinsic
def _array_at(typing, address, num_elements, like):
    array_type = types.Array(like.dtype, 1, "C")

    def codegen(context, builder, sig, args):
        array = make_array(array_type)(context, builder)
        item = context.get_constant(types.intp, array_type.dtype.bitwidth // 8)
        populate_array(array, builder.inttoptr(args[0], array.data.type), [args[1]], [item], item, None)
        return array._getvalue()

    return array_type(types.uint64, types.intp, like), codegen


@intrinsic
def _local_array(typing, like):
    array_type = types.Array(like.dtype, 1, "C")

    def codegen(context, builder, sig, args):
        storage = ir.ArrayType(context.get_data_type(array_type.dtype), verbs.LOCAL_ELEMENTS)
        data = cgutils.alloca_once(builder, storage)
        builder.store(ir.Constant(storage, None), data)
        array = make_array(array_type)(context, builder)
        item = context.get_constant(types.intp, array_type.dtype.bitwidth // 8)
        shape = context.get_constant(types.intp, verbs.LOCAL_ELEMENTS)
        populate_array(array, builder.bitcast(data, array.data.type), [shape], [item], item, None)
        return array._getvalue()

    return array_type(like), codegen


@intrinsic
def co_resident(typing):
    """Ask for a cooperative launch: the driver then refuses a grid that cannot be resident as a whole."""

    def codegen(context, builder, sig, args):
        context.active_code_library.use_cooperative = True
        return context.get_dummy_value()

    return types.void(), codegen


def undefined(value_type):
    """An intrinsic that gives some value of a type, for code that looks at types only."""

    def codegen(context, builder, sig, args):
        return ir.Constant(context.get_value_type(value_type), ir.Undefined)

    return intrinsic(lambda typing: (value_type(), codegen))


overload(verbs.lane)(lambda: lambda: _lane())
overload(verbs.lanes)(lambda: lambda: verbs.GPU_LANES)  # a constant: else kernels are full of divisions by it
overload(verbs.block_sync)(lambda: lambda: cuda.syncthreads())
overload(verbs.ld_acquire)(lambda words, i: lambda words, i: _ld_acquire(words, i))
overload(verbs.ld_relaxed)(lambda words, i: lambda words, i: _ld_relaxed(words, i))
overload(verbs.st_release)(lambda words, i, value: lambda words, i, value: _st_release(words, i, value))
overload(verbs.fetch_add)(lambda words, i, value: lambda words, i, value: _fetch_add(words, i, value))
overload(verbs.cas)(lambda words, i, expected, value: lambda words, i, expected, value: _cas(words, i, expected, value))
overload(verbs.now)(lambda: lambda: _global_timer())
# inlined, because Numba lets no other overload return an array of its own making
overload(verbs.array_at, inline="always")(
    lambda address, num_elements, like: lambda address, num_elements, like: _array_at(address, num_elements, like)
)
overload(verbs.record_at)(lambda words, at, like: lambda words, at, like: record_at(words, at, like))
overload(verbs.local_array, inline="always")(lambda like: lambda like: _local_array(like))
overload(verbs.zero_sums, inline="always")(lambda working, num_sums: lambda working, num_sums: _local_array(working))


@overload(verbs.has_settled)
def _has_settled(attempt):
    return lambda attempt: attempt >= SETTLED_POLLS


@overload(verbs.pause)
def _pause(attempt):
    def meaning(attempt):
        cuda.nanosleep(types.uint32(min(SHORTEST_SLEEP_NS << min(attempt, 5), LONGEST_SLEEP_NS)))
        return attempt + 1

    return meaning
