"""Values of several types at one place of an array: of registers, which have no type, and of memory.

`i32(array, i)` reads the value whose first byte is that of `array[i]`; `put` writes one of the value's type there. An
index is not looked at, as Numba would do.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from ..device.cpu import element_pointer


def _reader(kind):
    @intrinsic
    def read(typing, array, i):
        def codegen(context, builder, sig, args):
            pointer = element_pointer(context, builder, sig.args[0], *args)
            value = context.get_value_type(kind)
            return builder.load(builder.bitcast(pointer, value.as_pointer()), align=1)

        return kind(array, types.intp), codegen

    return read


i64, u64, i32, u32 = map(_reader, (types.int64, types.uint64, types.int32, types.uint32))
i16, u16 = map(_reader, (types.int16, types.uint16))
f32, f64 = map(_reader, (types.float32, types.float64))


@intrinsic
def put(typing, array, i, value):
    def codegen(context, builder, sig, args):
        pointer = element_pointer(context, builder, sig.args[0], *args[:2])
        builder.store(args[2], builder.bitcast(pointer, args[2].type.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def float_of_bits(typing, bits):
    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen
