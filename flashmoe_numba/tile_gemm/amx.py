"""The micro-kernel of `tiles` for AMX: blocks of 16 or 32 rows and 32 columns, in the tiles of the register file.

A block has one or two tiles of rows, two of weights, and a tile of sums for each pair of them. LLVM knows nothing of
these registers, so what happens from zeroed (or loaded) sums to stored ones is one piece of assembly. All tiles have 16
rows: of a shorter block the rest is computed as well, from what lies there, and stored where there is room for it.

Source: Intel, Software Developer's Manual, volume 1, chapter "Programming with Intel AMX".
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core.cgutils import global_constant
from numba.extending import intrinsic

from ..device.cpu import element_pointer
from .arithmetic import by_instruction
from .micro_kernel import ROW_STRIDE
from .panels import TILE_WORDS

TILE_ROWS = 16
TILE_BYTES = 64  # of a row
BLOCK_ROWS = 2 * TILE_ROWS
PANEL_BYTES = 2 * TILE_BYTES  # of one word of a panel's columns
BY_AMX = by_instruction("tiles")

# Palette 1: eight tiles of 16 rows of 64 bytes. Bytes 16 to 31 are widths, those from 48 on numbers of rows.
PALETTE = bytes([1, *[0] * 15, *[TILE_BYTES, 0] * 8, *[0] * 16, *[TILE_ROWS] * 8, *[0] * 8])
# Operands: 0 rows, 1 weights, 2 steps left, all of which it changes; 6 sums and 7 those of the second tile of rows, 8
# bytes between rows of sums, 9 between rows, 10 between words of the panel, 11 is not 0 if sums begin at zero.
_ROWS, _WEIGHTS, _STEPS, _SUMS, _LOWER, _STRIDE, _ROW_BYTES, _WORD_BYTES, _FIRST = (
    f"${{{n}}}" for n in (0, 1, 2, 6, 7, 8, 9, 10, 11)
)


def _sums(verb, tile, upper):
    """Load or store one of the tiles of sums: 0 and 1 of the upper rows, 2 and 3 of the lower ones."""
    place = f"{TILE_BYTES * (tile % 2)}({_SUMS if upper else _LOWER},{_STRIDE},1)"
    return f"tileloadd {place}, %tmm{tile}" if verb == "load" else f"tilestored %tmm{tile}, {place}"


def assembly(row_tiles: int) -> str:
    """Of a block with 1 or 2 tiles of rows (4 and 5); weights are in 6 and 7."""
    sums = [(tile, tile < 2) for tile in range(2 * row_tiles)]
    lower = TILE_ROWS * ROW_STRIDE * 4
    lines = [
        *(f"testb {_FIRST}, {_FIRST}", "jnz 2f"),
        *(_sums("load", *each) for each in sums),
        *("jmp 3f", "2:"),
        *(f"tilezero %tmm{tile}" for tile, _ in sums),
        "3:",
        *(f"tileloadd ({_ROWS},{_ROW_BYTES},1), %tmm4", f"tileloadd ({_WEIGHTS},{_WORD_BYTES},1), %tmm6"),
        "tdpbf16ps %tmm6, %tmm4, %tmm0",
        f"tileloadd {TILE_BYTES}({_WEIGHTS},{_WORD_BYTES},1), %tmm7",
        "tdpbf16ps %tmm7, %tmm4, %tmm1",
    ]
    if row_tiles == 2:
        lines += [
            f"tileloadd {lower}({_ROWS},{_ROW_BYTES},1), %tmm5",
            *("tdpbf16ps %tmm6, %tmm5, %tmm2", "tdpbf16ps %tmm7, %tmm5, %tmm3"),
        ]
    lines += [
        *(f"addq $${TILE_BYTES}, {_ROWS}", f"addq $${TILE_WORDS * PANEL_BYTES}, {_WEIGHTS}"),
        *(f"decq {_STEPS}", "jnz 3b"),
        *(_sums("store", *each) for each in sums),
    ]
    return "\n".join(lines)


def _emit_block(builder, row_tiles, rows, weights, steps, sums, sums_bytes, first):
    i64 = ir.IntType(64)
    lower = builder.add(sums, builder.mul(sums_bytes, i64(TILE_ROWS)))
    given = [rows, weights, steps, sums, lower, sums_bytes, i64(4 * ROW_STRIDE), i64(PANEL_BYTES), first]
    changed = ir.LiteralStructType([i64] * 3)
    function = ir.FunctionType(changed, [value.type for value in given])
    constraints = "=&r,=&r,=&r,0,1,2,r,r,r,r,r,q,~{memory},~{cc}"
    builder.asm(function, assembly(row_tiles), constraints, given, True)


@intrinsic
def amx_kernel(typing, rows, rows_at, height, weights, weights_at, depth, sums, sums_at, sums_stride, first):
    """sums[height, 32] (+)= rows[height, depth] @ weights[depth, 32], for up to BLOCK_ROWS rows; depth in words."""
    i64 = types.int64
    signature = types.void(rows, i64, i64, weights, i64, i64, sums, i64, i64, types.boolean)

    def codegen(context, builder, sig, args):
        word = ir.IntType(64)
        places = ((0, 1), (3, 4), (6, 7))  # an array and an index in it
        pointers = [element_pointer(context, builder, sig.args[array], args[array], args[at]) for array, at in places]
        at = [builder.ptrtoint(pointer, word) for pointer in pointers]
        steps = builder.sdiv(args[5], word(TILE_WORDS))
        first = builder.zext(args[9], ir.IntType(8)) if args[9].type.width == 1 else args[9]
        sums_bytes = builder.mul(args[8], word(4))
        with builder.if_else(builder.icmp_signed(">", args[2], word(TILE_ROWS))) as (tall, short):
            for row_tiles, block in ((2, tall), (1, short)):
                with block:
                    _emit_block(builder, row_tiles, at[0], at[1], steps, at[2], sums_bytes, first)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def configure_tiles(typing):
    """Give this thread's tiles their shape."""

    def codegen(context, builder, sig, args):
        data = ir.Constant(ir.ArrayType(ir.IntType(8), len(PALETTE)), bytearray(PALETTE))
        palette = builder.ptrtoint(global_constant(builder.module, "amx_palette", data), ir.IntType(64))
        function = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.asm(function, "ldtilecfg ($0)", "r,~{memory}", [palette], True)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def release_tiles(typing):
    """Nothing is in them any more, so that nobody saves them when threads take turns."""

    def codegen(context, builder, sig, args):
        builder.asm(ir.FunctionType(ir.VoidType(), []), "tilerelease", "~{memory}", [], True)
        return context.get_dummy_value()

    return types.void(), codegen
