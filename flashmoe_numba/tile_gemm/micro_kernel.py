"""Micro-kernels of CPUs: sums of some rows and one panel over a block of the depth, all of them in registers.

`make_micro_kernel` puts together a loop for each height; what one step of the loop does to the sums is the arithmetic
(arithmetic.py). Denormals are zeros for `pairs` and `tiles` because their callers set the control word so.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from ..device.cpu import bfloat_to_float, element_pointer, half_to_float
from .arithmetic import by_instruction, has_fused, target_features
from .gradients import GRADIENT_ROWS
from .panels import TILE_WORDS

VECTOR_BYTES = 64 if "+avx512f" in target_features() else 32 if "+avx2" in target_features() else 16
MICRO_ROWS = {64: 12, 32: 6, 16: 6}[VECTOR_BYTES]
MICRO_VECTORS = 2
FUSED = has_fused()
DEPTH_BLOCK = 256
ROW_STRIDE = DEPTH_BLOCK + 16  # a power of two would put all rows of a group into one cache set
binding.initialize_native_asmparser()  # Numba has only what prints assembly, and some instructions are written in it
LINE_BYTES = 64  # of a cache
ODD, EVEN = "odd", "even"  # halves of a word of two bfloat16, the high one and the low one


def _multiply_add(builder, a, b, c):
    """a * b + c, fused where the host can; without it LLVM would call a slow library routine for each lane."""
    if not FUSED:
        return builder.fadd(builder.fmul(a, b), c)
    suffix = "f32" if isinstance(c.type.element, ir.FloatType) else "f64"
    name = f"llvm.fma.v{c.type.count}{suffix}"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(c.type, [c.type] * 3), name
    )
    return builder.call(function, [a, b, c])


def _load_vector(builder, pointer, offset, vector, item_bytes):
    address = builder.bitcast(builder.gep(pointer, [offset]), vector.as_pointer())
    return builder.load(address, align=item_bytes)


def _weight_vector(builder, pointer, offset, dtype, vector):
    """Weights as a vector of the accumulator's type; 16-bit ones are converted on the way into registers."""
    if dtype not in (types.uint16, types.int16):
        return _load_vector(builder, pointer, offset, vector, dtype.bitwidth // 8)
    bits = _load_vector(builder, pointer, offset, ir.VectorType(ir.IntType(16), vector.count), 2)
    return half_to_float(builder, bits) if dtype == types.uint16 else bfloat_to_float(builder, bits)


def _broadcast(builder, pointer, offset, vector):
    value = builder.load(builder.gep(pointer, [offset]))
    undefined = ir.Constant(vector, ir.Undefined)
    single = builder.insert_element(undefined, value, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(single, undefined, zeros)


class _Operands(NamedTuple):
    """What a micro-kernel reads and writes, as LLVM values: pointers to its first elements, and sizes."""

    rows: ir.Value
    weights: ir.Value
    weight_type: types.Type
    depth: ir.Value
    sums: ir.Value
    sums_stride: ir.Value
    first: ir.Value  # not 0: sums begin at zero
    vector: ir.VectorType
    item_bytes: int

    @property
    def words(self):
        """The type of as many words as there are sums in a vector."""
        return ir.VectorType(ir.IntType(32), self.vector.count)


# Steps: (builder, operands, height, k, sums) -> all sums after the products from depth index (or word) k on.


def _fma_step(builder, o, height, k, sums, row_stride=ROW_STRIDE, depth_stride=1):
    count, word = o.vector.count, ir.IntType(64)
    panel_at = builder.mul(k, word(count * MICRO_VECTORS))
    b = [
        _weight_vector(builder, o.weights, builder.add(panel_at, word(v * count)), o.weight_type, o.vector)
        for v in range(MICRO_VECTORS)
    ]
    found, rows_at = [], builder.mul(k, word(depth_stride))
    for m in range(height):
        a = _broadcast(builder, o.rows, builder.add(rows_at, word(m * row_stride)), o.vector)
        found += [_multiply_add(builder, a, b[v], sums[m * MICRO_VECTORS + v]) for v in range(MICRO_VECTORS)]
    return found


def _weight_words(builder, o, k):
    """The panel's vectors of words k."""
    count, word = o.vector.count, ir.IntType(64)
    panel_at = builder.mul(k, word(count * MICRO_VECTORS))
    at = [builder.add(panel_at, word(v * count)) for v in range(MICRO_VECTORS)]
    return [_load_vector(builder, o.weights, offset, o.words, 4) for offset in at]


def _row_word(builder, o, k, m):
    """Word k of row m in all places of a vector."""
    pointer = builder.bitcast(o.rows, ir.IntType(32).as_pointer())
    return _broadcast(builder, pointer, builder.add(k, ir.IntType(64)(m * ROW_STRIDE)), o.words)


def _half(builder, words, half, vector):
    """One half of each word, as floats."""
    if half == ODD:
        bits = builder.and_(words, ir.Constant(words.type, [-65536] * words.type.count))
    else:
        bits = builder.shl(words, ir.Constant(words.type, [16] * words.type.count))
    return builder.bitcast(bits, vector)


def _half_step(builder, o, height, k, sums, half):
    """The products of one half of words k."""
    b = [_half(builder, words, half, o.vector) for words in _weight_words(builder, o, k)]
    found = []
    for m in range(height):
        a = _half(builder, _row_word(builder, o, k, m), half, o.vector)
        found += [_multiply_add(builder, a, b[v], sums[m * MICRO_VECTORS + v]) for v in range(MICRO_VECTORS)]
    return found


def _pair_step(builder, o, height, k, sums):
    for half in (ODD, EVEN):
        sums = _half_step(builder, o, height, k, sums, half)
    return sums


def _pair_instruction(builder, o, height, k, sums):
    """The same by vdpbf16ps; as assembly, because LLVM's intrinsic has other types from one version to the next."""
    b, found = _weight_words(builder, o, k), []
    function = ir.FunctionType(o.vector, [o.words, o.words, o.vector])
    for m in range(height):
        a = _row_word(builder, o, k, m)
        parts = [[b[v], a, sums[m * MICRO_VECTORS + v]] for v in range(MICRO_VECTORS)]
        found += [builder.asm(function, "vdpbf16ps $2, $1, $0", "=v,v,v,0", part, False) for part in parts]
    return found


def _tile_step(builder, o, height, k, sums):
    """TILE_WORDS words: chains of even and of odd products from zero, whose sum is added."""
    even, odd = (_half_chain(builder, o, height, k, half, len(sums)) for half in (EVEN, ODD))
    parts = [builder.fadd(e, d) for e, d in zip(even, odd, strict=True)]
    return [builder.fadd(total, part) for total, part in zip(sums, parts, strict=True)]


def _half_chain(builder, o, height, first, half, num_sums):
    """The sums of the products of one half of TILE_WORDS words."""

    def step(k, sums):
        return _half_step(builder, o, height, builder.add(first, k), sums, half)

    return _emit_loop(builder, half, ir.IntType(64)(TILE_WORDS), 1, [_zero(o)] * num_sums, step)


def _zero(o):
    return ir.Constant(o.vector, [o.vector.element(0.0)] * o.vector.count)


def _emit_loop(builder, name, end, stride, sums, step):
    """`sums = step(k, sums)` for k from 0 up to `end`, at least once: the sums, with the builder behind the loop."""
    before, word = builder.block, ir.IntType(64)
    loop, done = (builder.append_basic_block(f"{part}_{name}") for part in ("loop", "done"))
    builder.branch(loop)
    builder.position_at_end(loop)
    k, *running = (_phi(builder, {before: value}) for value in [word(0), *sums])
    following = step(k, running)
    k_next = builder.add(k, word(stride))
    for phi, value in zip([k, *running], [k_next, *following], strict=True):
        phi.add_incoming(value, builder.block)  # a step may have loops of its own
    builder.cbranch(builder.icmp_signed("<", k_next, end), loop, done)
    builder.position_at_end(done)
    return following


def _phi(builder, values):
    phi = builder.phi(next(iter(values.values())).type)
    for block, value in values.items():
        phi.add_incoming(value, block)
    return phi


def _first_sums(builder, o, height, cells):
    """Zeros, or what an earlier block of the depth left in memory."""
    start = builder.block
    resume, begin = (builder.append_basic_block(f"{name}_{height}") for name in ("resume", "begin"))
    builder.cbranch(builder.icmp_unsigned("!=", o.first, o.first.type(0)), begin, resume)
    builder.position_at_end(resume)
    partial = [_load_vector(builder, o.sums, offset, o.vector, o.item_bytes) for offset in cells()]
    builder.branch(begin)
    builder.position_at_end(begin)
    return [_phi(builder, {start: _zero(o), resume: value}) for value in partial]


def _emit_kernel(builder, o, height, step, stride, end, streams):
    """sums[height, panel] (+)= rows[height, depth] @ weights[depth, panel], all sums in registers; then to `end`."""
    word, count = ir.IntType(64), o.vector.count

    def cells():
        places = [(m, v) for m in range(height) for v in range(MICRO_VECTORS)]
        return [builder.add(builder.mul(o.sums_stride, word(m)), word(v * count)) for m, v in places]

    sums = _first_sums(builder, o, height, cells)
    sums = _emit_loop(builder, height, o.depth, stride, sums, lambda k, sums: step(builder, o, height, k, sums))
    for offset, value in zip(cells(), sums, strict=True):
        address = builder.bitcast(builder.gep(o.sums, [offset]), o.vector.as_pointer())
        stored = builder.store(value, address, align=VECTOR_BYTES if streams else o.item_bytes)
        if streams:
            stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
    builder.branch(end)


@intrinsic
def drain_stores(typing):
    """What was streamed is seen before what this thread stores from now on."""

    def codegen(context, builder, sig, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _make_micro_kernel(step, stride=1, least_height=1, streams=False):
    """An intrinsic with a loop for each height: sums[height, panel] (+)= rows[height, depth] @ weights[depth, panel].

    Args:
        step, stride: what one turn of the loop does, and how many depth indices (or words) it takes.
        least_height: of the heights that it has, up to MICRO_ROWS.
        streams: are sums stored past the caches? They lie at multiples of LINE_BYTES then, and others see them after
            `drain_stores`.
    """

    @intrinsic
    def micro_kernel(typing, rows, rows_at, height, weights, weights_at, depth, sums, sums_at, sums_stride, first):
        i64 = types.int64
        signature = types.void(rows, i64, i64, weights, i64, i64, sums, i64, i64, types.boolean)

        def codegen(context, builder, sig, args):
            item_bytes = sig.args[6].dtype.bitwidth // 8
            operands = _Operands(
                rows=element_pointer(context, builder, sig.args[0], args[0], args[1]),
                weights=element_pointer(context, builder, sig.args[3], args[3], args[4]),
                weight_type=sig.args[3].dtype,
                depth=args[5],
                sums=element_pointer(context, builder, sig.args[6], args[6], args[7]),
                sums_stride=args[8],
                first=args[9],
                vector=ir.VectorType(context.get_data_type(sig.args[6].dtype), VECTOR_BYTES // item_bytes),
                item_bytes=item_bytes,
            )
            end = builder.append_basic_block("end")
            switch = builder.switch(args[2], end)
            for height in range(least_height, MICRO_ROWS + 1):
                case = builder.append_basic_block(f"height_{height}")
                switch.add_case(height, case)
                builder.position_at_end(case)
                _emit_kernel(builder, operands, height, step, stride, end, streams)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return signature, codegen

    return micro_kernel


fma_kernel = _make_micro_kernel(_fma_step)
_outer_step = partial(_fma_step, row_stride=1, depth_stride=GRADIENT_ROWS)
outer_kernel = _make_micro_kernel(_outer_step)  # of rows that are columns: k of row m lies at k * GRADIENT_ROWS + m
outer_stream = _make_micro_kernel(_outer_step, least_height=MICRO_ROWS, streams=True)
pair_kernel = _make_micro_kernel(_pair_instruction if by_instruction("pairs") else _pair_step)
tile_kernel = _make_micro_kernel(_tile_step, TILE_WORDS)
