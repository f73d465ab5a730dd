"""Sums of products on Hopper: tiles come by TMA, tensor cores multiply (wgmma), and sums leave through shared memory.

A tile is 128 columns of weights by up to 128 rows. Weights are wgmma's first operand and rows its second (its N), so a
tile of 16 rows costs an eighth of one of 128 and not half, and one instruction serves every height. A gated expert's
tile has 64 gate columns, then the 64 up columns of the same results.

    stage       128 weights' columns by 128 bytes of depth (two TMA boxes), then `rows` rows by 128 bytes of depth; both
                K-major with the 128-byte swizzle, so a step of 32 bytes along the depth adds 2 to a descriptor
    pipeline    STAGES[rows] stages; thread 0 asks for a block of the depth as soon as its stage has been read
    sums        thread t of warp w holds columns 16 w + t/4 (+ 8) and rows 2 (t % 4) (+ 1) of each 8 (PTX ISA, wgmma)

Every sum is one chain over the depth in steps of 32 bytes, in registers, whatever the number of rows.

The rows were written by ordinary stores, and TMA reads through the asynchronous proxy: whoever has acquired the rows'
signal must issue a proxy fence before it asks for them. Thread 0 does both; where rows are gathered, each thread that
asks for one has met thread 0 at a barrier since, and fences, too. Thread 0 fences the maps for its block.

Here are the geometry and the PTX, as text; cuda.py makes it callable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..device.vocabulary import GPU_LANES
from .matrices import MAX_TILE_COLUMNS, SUMS_STRIDE

THREADS = GPU_LANES  # of a block of any kernel: one warpgroup
ROWS = (16, 32, 64, 128)  # heights of a tile
STAGES = {16: 6, 32: 5, 64: 4, 128: 3}  # as many as leave room for a second block on a multiprocessor
DEPTH_BYTES = 128  # of a block of the depth: the swizzle's width
STEP_BYTES = 32  # of one instruction
HALF_COLUMNS = MAX_TILE_COLUMNS // 2  # wgmma's M
WEIGHT_BYTES = MAX_TILE_COLUMNS * DEPTH_BYTES
BARRIERS_AT = max(STAGES[rows] * (WEIGHT_BYTES + rows * DEPTH_BYTES) for rows in ROWS)  # in shared memory
SHARED_BYTES = BARRIERS_AT + 8 * max(STAGES.values())
SHARED_ALIGNMENT = 1024  # of the swizzle
MAP_WORDS = 16  # of a CUtensorMap
NUM_MAPS = 2 + len(ROWS) + 1

# Descriptor of a K-major operand with the 128-byte swizzle: 8 rows are 1024 bytes apart. The address is added.
_DESCRIPTOR = 1 << 62 | (1024 >> 4) << 32 | 1 << 16
# (instruction's types, its depth, flags after the descriptors)
INSTRUCTIONS = {
    "float16": ("f32.f16.f16", 16, "1, 1, 0, 0"),
    "bfloat16": ("f32.bf16.bf16", 16, "1, 1, 0, 0"),
    "float32": ("f32.tf32.tf32", 8, "1, 1"),
}


class TmaMatrices(NamedTuple):
    """`Matrices` with maps for TMA: the fields of that, then the maps."""

    first: Any
    second: Any
    bias: Any
    depth: int
    columns: int
    tile_n: int
    parts: int
    group_rows: int
    maps: Any  # int64 [NUM_MAPS, MAP_WORDS]: of first, of second, of the rows to multiply in boxes of ROWS, and of one


def main_loop(rows: int, dtype: str, gathered: bool = False) -> str:
    """PTX of a whole tile for `rows` rows and 128 columns.

    Operands: $0 sums in shared memory (generic address), $1 maps, $2 the first row, $3 and $4 the first columns of both
    halves, $5 the expert, $6 blocks of the depth, $7 the address of the map of the second half.

    Args:
        gathered: the rows lie anywhere: $2 is the thread's own row, and each of the first `rows` threads brings one.
            A box of one row may begin at any multiple of 128 bytes of shared memory: which bits of an address the
            swizzle exchanges follows from the address, not from the box (section 5.5.7).
    """
    kind, depth, flags = INSTRUCTIONS[dtype]
    stages, sums = STAGES[rows], rows // 2
    stage_bytes = WEIGHT_BYTES + rows * DEPTH_BYTES
    elements = DEPTH_BYTES // STEP_BYTES * depth

    def accumulators(half: int) -> str:
        return ", ".join(f"d{half * sums + i}" for i in range(sums))

    def load(stage: str, barrier: str) -> list[str]:
        """Ask for block `block` of the depth, if `go`; for the thread's own row of it, if `own`."""
        tma = "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes"
        parts = [(0, "3", "$1", "{x, $3, $5}"), (WEIGHT_BYTES // 2, "3", "$7", "{x, $4, $5}")]
        if not gathered:
            parts.append((WEIGHT_BYTES, "2", "rowmap", "{x, $2}"))
        own = [
            f"add.u32 own_at, {stage}, own_row;",
            f"@own {tma.format(2)} [own_at], [rowmap, {{x, $2}}], [{barrier}];",
        ]
        return [
            f"mul.lo.s32 x, block, {elements};",
            f"@go mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {stage_bytes};",
            *[f"@go {tma.format(rank)} [{stage}+{at}], [{m}, {c}], [{barrier}];" for at, rank, m, c in parts],
            *(own if gathered else []),
        ]

    def own_if(greater: str) -> list[str]:
        return [f"setp.gt.and.s32 own, {greater};"] if gathered else []

    own_row = [
        f"setp.lt.u32 first, thread, {rows};",
        f"mad.lo.u32 own_row, thread, {DEPTH_BYTES}, {WEIGHT_BYTES};",
    ]
    lines = [
        ".reg .pred lead, go, done, sum;",
        f".reg .f32 d<{2 * sums}>;",
        ".reg .b32 thread, x, block, k, stage, shared, barriers, at, barrier, at_before, barrier_before, parity;",
        ".reg .b64 rowmap, a, a0, a1, b, address;",
        *([".reg .pred own, first;", ".reg .b32 own_at, own_row;"] if gathered else []),
        "cvta.to.shared.u64 address, $0;",
        "cvt.u32.u64 shared, address;",
        f"add.u32 barriers, shared, {BARRIERS_AT};",
        f"add.u64 rowmap, $1, {8 * MAP_WORDS * (2 + (len(ROWS) if gathered else ROWS.index(rows)))};",
        "mov.u32 thread, %tid.x;",
        "setp.eq.u32 lead, thread, 0;",
        *(own_row if gathered else []),
        # what ordinary stores wrote, here and in the rows, comes before what TMA does
        "fence.proxy.async;",
        *[f"@lead mbarrier.init.shared::cta.b64 [barriers+{8 * s}], 1;" for s in range(stages)],
        "@lead fence.mbarrier_init.release.cluster;",
        *[f"@lead fence.proxy.tensormap::generic.acquire.sys [{m}], 128;" for m in ("$1", "$7", "rowmap")],
        f"bar.sync 1, {THREADS};",
    ]
    for s in range(stages):
        lines += [f"setp.gt.and.s32 go, $6, {s}, lead;", *own_if(f"$6, {s}, first"), f"mov.u32 block, {s};"]
        lines += [f"add.u32 at, shared, {s * stage_bytes};", f"add.u32 barrier, barriers, {8 * s};"]
        lines += load("at", "barrier")
    lines += [
        *("mov.u32 k, 0;", "mov.u32 stage, 0;", "mov.u32 parity, 0;", "mov.u32 at, shared;"),
        *("mov.u32 barrier, barriers;", "mov.u32 at_before, shared;", "mov.u32 barrier_before, barriers;"),
        # set here, and not by the first instruction: else they would count as read, and so as alive, from the start
        *(f"mov.f32 d{i}, 0f00000000;" for i in range(2 * sums)),
        "setp.eq.u32 sum, 0, 0;",
        "DEPTH${:uid}:",
        "WAIT${:uid}:",
        "mbarrier.try_wait.parity.shared::cta.b64 done, [barrier], parity;",
        "@!done bra WAIT${:uid};",
        "wgmma.fence.sync.aligned;",
        *("shr.u32 x, at, 4;", "cvt.u64.u32 a, x;", f"or.b64 a, a, {_DESCRIPTOR};"),
    ]
    for step in range(DEPTH_BYTES // STEP_BYTES):
        ahead = step * STEP_BYTES >> 4
        lines += [
            f"add.u64 a0, a, {ahead};",
            f"add.u64 a1, a, {(WEIGHT_BYTES // 2 >> 4) + ahead};",
            f"add.u64 b, a, {(WEIGHT_BYTES >> 4) + ahead};",
            *[
                f"wgmma.mma_async.sync.aligned.m64n{rows}k{depth}.{kind} "
                f"{{{accumulators(half)}}}, a{half}, b, sum, {flags};"
                for half in range(2)
            ],
        ]
    lines += [
        "wgmma.commit_group.sync.aligned;",
        # all but this block of the depth have been multiplied: the stage before this one may be filled again
        "wgmma.wait_group.sync.aligned 1;",
        f"bar.sync 1, {THREADS};",
        f"add.s32 block, k, {stages - 1};",
        "setp.gt.and.s32 go, k, 0, lead;",
        "setp.lt.and.s32 go, block, $6, go;",
        *own_if("k, 0, first"),
        *(["setp.lt.and.s32 own, block, $6, own;"] if gathered else []),
        *load("at_before", "barrier_before"),
        *("mov.u32 at_before, at;", "mov.u32 barrier_before, barrier;"),
        *("add.s32 k, k, 1;", "add.s32 stage, stage, 1;"),
        *(f"add.u32 at, at, {stage_bytes};", "add.u32 barrier, barrier, 8;"),
        f"setp.eq.s32 done, stage, {stages};",
        *("@done mov.u32 stage, 0;", "@done mov.u32 at, shared;", "@done mov.u32 barrier, barriers;"),
        "@done xor.b32 parity, parity, 1;",
        "setp.lt.s32 go, k, $6;",
        "@go bra DEPTH${:uid};",
        "wgmma.wait_group.sync.aligned 0;",
        f"bar.sync 1, {THREADS};",
        *[f"@lead mbarrier.inval.shared::cta.b64 [barriers+{8 * s}];" for s in range(stages)],
        *_store_sums(rows),
    ]
    return "{\n" + "\n".join(lines) + "\n}"


def fragment(thread: int, i: int, half: int) -> tuple[int, int]:
    """(row, column) of the tile that accumulator i of a half of the columns holds in a thread."""
    warp, lane = divmod(thread, 32)
    column = half * HALF_COLUMNS + 16 * warp + lane // 4 + 8 * (i // 2 % 2)
    return 8 * (i // 4) + 2 * (lane % 4) + i % 2, column


def _store_sums(rows: int) -> list[str]:
    """From registers to `[rows, SUMS_STRIDE]` in shared memory: an address is that of the thread plus a constant."""
    row_step, column_step = (fragment(1, 0, 0)[0], fragment(4, 0, 0)[1])
    lines = [
        *("and.b32 x, thread, 3;", f"mul.lo.u32 at, x, {4 * SUMS_STRIDE * row_step};"),
        *("and.b32 x, thread, 31;", "shr.u32 x, x, 2;", f"mad.lo.u32 at, x, {4 * column_step}, at;"),
        *("shr.u32 x, thread, 5;", f"mad.lo.u32 at, x, {4 * fragment(32, 0, 0)[1]}, at;"),
        "add.u32 at, at, shared;",
    ]
    for half in range(2):
        for i in range(rows // 2):
            row, column = fragment(0, i, half)
            lines.append(f"st.shared.f32 [at+{4 * (row * SUMS_STRIDE + column)}], d{half * rows // 2 + i};")
    return lines


def tma_matrices(matrices: Any, maps: Any, tile_n: int) -> TmaMatrices:
    """`Matrices` with maps, and with tiles of so many columns: one is not cut where a matrix has fewer.

    Args:
        tile_n: HALF_COLUMNS of each part, or all 128 of the only one.
    """
    return TmaMatrices._make((*matrices._replace(tile_n=tile_n, group_rows=max(ROWS)), maps))
