"""The vocabulary's elements and rows compiled for NVIDIA GPUs: 16 bytes per lane and access where addresses allow it.

NVVM makes vectors of no accesses whose alignment it does not know, so they are made here.
"""

from __future__ import annotations

from . import vocabulary as verbs
from .cuda_api import element_pointer, intrinsic, ir, overload, types

VECTOR_BYTES = 16
MOST_SUMS = VECTOR_BYTES // 2  # of a lane: a vector of the shortest elements
_ROUND = {types.uint16: "cvt.rn.f16.f32 $0, $1;", types.int16: "cvt.rn.bf16.f32 $0, $1;"}  # bfloat16 from sm_80 on


def _widened(builder, element, value):
    """An element in the accumulator's type (LLVM values). uint16: float16 bits, int16: bfloat16 bits."""
    if element == types.uint16:
        function = ir.FunctionType(ir.FloatType(), [ir.IntType(16)])
        return builder.asm(function, "cvt.f32.f16 $0, $1;", "=f,h", [value], False)
    if element == types.int16:
        word = builder.shl(builder.zext(value, ir.IntType(32)), ir.IntType(32)(16))
        return builder.bitcast(word, ir.FloatType())
    return value


def _rounded(builder, element, value):
    """The other way."""
    if element not in _ROUND:
        return value
    function = ir.FunctionType(ir.IntType(16), [ir.FloatType()])
    return builder.asm(function, _ROUND[element], "=h,f", [value], False)


@intrinsic
def _bits_to_float(typing, bits):
    return types.float32(bits), lambda context, builder, sig, args: _widened(builder, bits, args[0])


def _float_to_bits(kind):
    def codegen(context, builder, sig, args):
        return _rounded(builder, kind, args[0])

    return intrinsic(lambda typing, value: (kind(types.float32), codegen))


_to_half, _to_bfloat = _float_to_bits(types.uint16), _float_to_bits(types.int16)


@intrinsic
def _get(typing, array, i):
    """`array[i]` without Numba's wrap-around of negative indices, which takes five instructions of every access."""

    def codegen(context, builder, sig, args):
        return builder.load(element_pointer(context, builder, sig.args[0], *args))

    return array.dtype(array, types.intp), codegen


@intrinsic
def _put(typing, array, i, value):
    """`array[i] = value`, likewise."""

    def codegen(context, builder, sig, args):
        builder.store(args[2], element_pointer(context, builder, sig.args[0], *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), codegen


@overload(verbs.load)
def _load(array, i):
    if array.dtype in (types.uint16, types.int16):
        return lambda array, i: _bits_to_float(_get(array, i))
    return lambda array, i: _get(array, i)


@overload(verbs.store)
def _store(array, i, value):
    rounded = {types.uint16: _to_half, types.int16: _to_bfloat}.get(array.dtype)

    def meaning(array, i, value):
        _put(array, i, value)

    def meaning_of_16_bits(array, i, value):
        _put(array, i, rounded(types.float32(value)))

    return meaning_of_16_bits if rounded else meaning


@intrinsic
def _address_of(typing, array, i):
    def codegen(context, builder, sig, args):
        return builder.ptrtoint(element_pointer(context, builder, sig.args[0], args[0], args[1]), ir.IntType(64))

    return types.uint64(array, types.intp), codegen


@intrinsic
def _copy_vector(typing, target, source):
    """16 bytes from one address to another, both multiples of 16."""

    def codegen(context, builder, sig, args):
        ptx = "{ .reg .b32 v<4>; ld.global.v4.b32 {v0, v1, v2, v3}, [$1]; st.global.v4.b32 [$0], {v0, v1, v2, v3}; }"
        word = ir.IntType(64)
        builder.asm(ir.FunctionType(ir.VoidType(), [word, word]), ptx, "l,l,~{memory}", args, True)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64), codegen


@overload(verbs.copy_row)
def _copy_row(target, target_at, source, source_at, num_elements):
    item = target.dtype.bitwidth // 8

    def meaning(target, target_at, source, source_at, num_elements):
        to, come = _address_of(target, target_at), _address_of(source, source_at)
        num_bytes = num_elements * item
        if (to | come | types.uint64(num_bytes)) % types.uint64(VECTOR_BYTES) == 0:
            for at in range(verbs.lane() * VECTOR_BYTES, num_bytes, verbs.lanes() * VECTOR_BYTES):
                _copy_vector(to + types.uint64(at), come + types.uint64(at))
        else:
            for c in range(verbs.lane(), num_elements, verbs.lanes()):
                _put(target, target_at + c, _get(source, source_at + c))

    return meaning


# Sums of a part of a row: a vector of elements at a time where rows begin at multiples of it, else one element. They
# stay in registers, because both ways know the number of sums when they are compiled.


def _elements_per(num_bytes, array_type):
    """Elements in so many bytes, at least one."""
    return max(1, num_bytes * 8 // array_type.dtype.bitwidth)


def _vector_ptx(count, first, to_elements):
    """(PTX that moves v0 to v3 to `count` operands from $first on, or from there; constraint of an operand)"""
    parts = []
    for k in range(min(count, VECTOR_BYTES // 4)):
        if count == 8:
            width, element, vector = 32, f"{{${first + 2 * k}, ${first + 2 * k + 1}}}", f"v{k}"
        elif count == 4:
            width, element, vector = 32, f"${first + k}", f"v{k}"
        else:
            width, element, vector = 64, f"${first + k}", f"{{v{2 * k}, v{2 * k + 1}}}"
        target, value = (element, vector) if to_elements else (vector, element)
        parts.append(f"mov.b{width} {target}, {value};")
    return " ".join(parts), {8: "h", 4: "f", 2: "d"}[count]


def _load_elements(context, builder, array_type, array, i, count):
    """A vector's elements from `i` on as LLVM values, or the one at `i`."""
    pointer = element_pointer(context, builder, array_type, array, i)
    if count == 1:
        return [builder.load(pointer)]
    moves, register = _vector_ptx(count, 0, True)
    ptx = f"{{ .reg .b32 v<4>; ld.global.v4.b32 {{v0, v1, v2, v3}}, [${count}]; {moves} }}"
    elements = ir.LiteralStructType([pointer.type.pointee] * count)
    constraints = f"={register}," * count + "l,~{memory}"
    loaded = builder.asm(ir.FunctionType(elements, [pointer.type]), ptx, constraints, [pointer], True)
    return [builder.extract_value(loaded, c) for c in range(count)]


def _store_elements(context, builder, array_type, array, i, values):
    """The other way."""
    pointer, count = element_pointer(context, builder, array_type, array, i), len(values)
    if count == 1:
        builder.store(values[0], pointer)
        return
    moves, register = _vector_ptx(count, 1, False)
    ptx = f"{{ .reg .b32 v<4>; {moves} st.global.v4.b32 [$0], {{v0, v1, v2, v3}}; }}"
    function = ir.FunctionType(ir.VoidType(), [pointer.type, *[value.type for value in values]])
    builder.asm(function, ptx, "l" + f",{register}" * count + ",~{memory}", [pointer, *values], True)


def _sum_pointers(context, builder, array_type, sums, count):
    return [element_pointer(context, builder, array_type, sums, ir.IntType(64)(c)) for c in range(count)]


def _adds(num_bytes):
    """Intrinsic `f(sums, source, source_at, weight)` for as many elements as these bytes hold, or one."""

    @intrinsic
    def add(typing, sums, source, source_at, weight):
        count = _elements_per(num_bytes, source)

        def codegen(context, builder, sig, args):
            elements = _load_elements(context, builder, source, args[1], args[2], count)
            pointers = _sum_pointers(context, builder, sums, args[0], count)
            for pointer, element in zip(pointers, elements, strict=True):
                value = _widened(builder, source.dtype, element)
                builder.store(builder.fma(args[3], value, builder.load(pointer)), pointer)
            return context.get_dummy_value()

        return types.void(sums, source, types.intp, sums.dtype), codegen

    return add


def _stores(num_bytes):
    """Intrinsic `f(target, target_at, sums)`, likewise."""

    @intrinsic
    def store(typing, target, target_at, sums):
        count = _elements_per(num_bytes, target)

        def codegen(context, builder, sig, args):
            pointers = _sum_pointers(context, builder, sums, args[2], count)
            values = [_rounded(builder, target.dtype, builder.load(pointer)) for pointer in pointers]
            _store_elements(context, builder, target, args[0], args[1], values)
            return context.get_dummy_value()

        return types.void(target, types.intp, sums), codegen

    return store


@intrinsic
def _add_at(typing, sums, c, source, source_at, weight):
    """Add `weight` times one element to sum c, as the others do."""

    def codegen(context, builder, sig, args):
        pointer = element_pointer(context, builder, sums, args[0], args[1])
        element = builder.load(element_pointer(context, builder, source, args[2], args[3]))
        value = _widened(builder, source.dtype, element)
        builder.store(builder.fma(args[4], value, builder.load(pointer)), pointer)
        return context.get_dummy_value()

    return types.void(sums, types.intp, source, types.intp, sums.dtype), codegen


@intrinsic
def _store_at(typing, target, target_at, sums, c):
    """Round sum c to the element type, and store it."""

    def codegen(context, builder, sig, args):
        value = builder.load(element_pointer(context, builder, sums, args[2], args[3]))
        builder.store(
            _rounded(builder, target.dtype, value), element_pointer(context, builder, target, args[0], args[1])
        )
        return context.get_dummy_value()

    return types.void(target, types.intp, sums, types.intp), codegen


_add_vector, _add_element = _adds(VECTOR_BYTES), _adds(0)
_store_vector, _store_element = _stores(VECTOR_BYTES), _stores(0)


@overload(verbs.part_columns)
def _part_columns(target, source, num_columns):
    item = source.dtype.bitwidth // 8

    def meaning(target, source, num_columns):
        bits = _address_of(target, 0) | _address_of(source, 0) | types.uint64(num_columns * item)
        return VECTOR_BYTES // item if bits % types.uint64(VECTOR_BYTES) == 0 else 1

    return meaning


@overload(verbs.add_part, inline="always")
def _add_part(sums, num_sums, source, source_at, weight):
    whole = _elements_per(VECTOR_BYTES, source)

    def meaning(sums, num_sums, source, source_at, weight):
        if num_sums == 1:
            _add_element(sums, source, source_at, weight)
        elif num_sums == whole:
            _add_vector(sums, source, source_at, weight)
        else:  # of a row whose elements are smaller than those of another that is added
            for c in range(MOST_SUMS):  # unrolled, so that sums stay in registers
                if c < num_sums:
                    _add_at(sums, c, source, source_at + c, weight)

    return meaning


@overload(verbs.scale_part, inline="always")
def _scale_part(sums, num_sums, scale, scale_at):
    def meaning(sums, num_sums, scale, scale_at):
        for c in range(MOST_SUMS):  # unrolled, so that sums stay in registers
            if c < num_sums:
                sums[c] = sums[c] * _get(scale, scale_at + c)

    return meaning


@overload(verbs.store_part, inline="always")
def _store_part(target, target_at, sums, num_sums):
    whole = _elements_per(VECTOR_BYTES, target)

    def meaning(target, target_at, sums, num_sums):
        if num_sums == 1:
            _store_element(target, target_at, sums)
        elif num_sums == whole:
            _store_vector(target, target_at, sums)
        else:
            for c in range(MOST_SUMS):  # likewise
                if c < num_sums:
                    _store_at(target, target_at + c, sums, c)

    return meaning
