"""The main loop for Hopper, without a GPU: the machine runs its PTX as a kernel of one block (flashmoe_numba/ptx).

What the instructions do has tests of its own (tests/unit/ptx). So offsets, descriptors, stages and phases have to agree
with what these read and write, and the sums with `x @ w.T`, bit for bit: all numbers are small integers.

Copies and multiplications happen at once or as late as the text allows, by seed, so that a stage that is overwritten
too early or read too early shows. What this cannot show: what the hardware really does.
"""

import re

import numpy as np
import pytest
from ptx_kernels import Bench

from flashmoe_numba.gpu.libcuda import ELEMENTS
from flashmoe_numba.ptx import faults, opcodes, tensors
from flashmoe_numba.ptx.faults import PtxFault
from flashmoe_numba.ptx.program import CODE, TARGET
from flashmoe_numba.ptx.tensor_map import SWIZZLE_128B, TensorMap
from flashmoe_numba.tile_gemm import hopper
from flashmoe_numba.tile_gemm.hopper import (
    BARRIERS_AT,
    DEPTH_BYTES,
    HALF_COLUMNS,
    INSTRUCTIONS,
    MAP_WORDS,
    ROWS,
    SHARED_ALIGNMENT,
    SHARED_BYTES,
    STAGES,
    STEP_BYTES,
    THREADS,
    WEIGHT_BYTES,
    fragment,
    main_loop,
)
from flashmoe_numba.tile_gemm.matrices import MAX_TILE_COLUMNS, SUMS_STRIDE
from reference import element_dtype

MULTIPROCESSOR_SHARED_BYTES, RESERVED_BYTES, STATIC_BYTES = 233472, 1024, 1024  # of an H100; the last two of a block
FULL = MAX_TILE_COLUMNS
DTYPES = tuple(INSTRUCTIONS)
BITS = {"float16": "uint16", "bfloat16": "int16", "float32": "float32"}  # as gpu/ names elements to the driver
AT_ONCE = dict(late_ns=0)
SCHEDULES = (AT_ONCE, *(dict(seed=seed) for seed in range(3)))


# a kernel around the text

NUM_OPERANDS = 8
OPERANDS = "".join(f"ld.global.u64 %rd{10 + i}, [%rd0+{8 * i}];" for i in range(1, NUM_OPERANDS)) + (
    "mov.u64 %rd10, dynamic; cvta.shared.u64 %rd10, %rd10;"
)


OWN_ROW = "mov.u32 %r12, %tid.x; mul.wide.u32 %rd8, %r12, 8; add.s64 %rd8, %rd8, %rd12; ld.global.u64 %rd12, [%rd8];"


def kernel_of(text, rows, gathered):
    """The text with its operands from an array, the first but for shared memory's address; and its sums to another.

    Gathered, the operand of the row is the address of an array of each thread's.
    """
    for i in range(NUM_OPERANDS):
        text = text.replace(f"${i}", f"%rd{10 + i}")
    column = "bar.sync 0; shl.b64 %rd3, %rd2, 2; add.s64 %rd4, %rd3, %rd1; mov.u64 %rd10, dynamic;"
    column += "add.s64 %rd10, %rd10, %rd3; cvt.u32.u64 %r10, %rd10;"
    leave = [
        f"ld.shared.u32 %r11, [%r10+{4 * SUMS_STRIDE * row}]; st.global.u32 [%rd4+{4 * FULL * row}], %r11;"
        for row in range(rows)
    ]
    return OPERANDS + OWN_ROW * gathered + text.replace("${:uid}", "") + column + "".join(leave)


def run_text(bench, text, rows, operands, gathered=False):
    """What the text leaves as sums, `[rows, 128]`."""
    sums = bench.array(rows * FULL, np.float32, granule=4)
    bench.run(
        kernel_of(text, rows, gathered), bench.array(NUM_OPERANDS, granule=8, values=operands), sums,
        threads=THREADS, dynamic_bytes=SHARED_BYTES,
    )  # fmt: skip
    return sums.reshape(rows, FULL)


class Tile:
    """Some experts' weights and some rows, and one tile of their product."""

    def __init__(self, dtype, rows, depth, gated, seed=0, gathered=False):
        rng = np.random.default_rng(seed)
        self.dtype, self.rows, self.depth, self.parts = dtype, rows, depth, 1 + gated
        self.expert, self.a_row, self.columns = 1, 5, 200
        first = HALF_COLUMNS if gated else FULL  # the second tile, of which not all columns are there
        self.at = first, first + (0 if gated else HALF_COLUMNS)
        element = element_dtype(dtype)
        make = [(3, self.columns, depth)] * self.parts + [(self.a_row + rows + 2 - 4, depth)]  # the last rows: none
        *self.weights, self.x = (rng.integers(-3, 4, shape).astype(element) for shape in make)
        order = rng.integers(0, len(self.x), rows)  # of those that are gathered: any, also twice the same
        self.order = order[np.minimum(np.arange(THREADS), rows - 1)] if gathered else None

    def _maps(self, bench):
        """The address of maps of the arrays, copied to where the machine finds them."""
        block = DEPTH_BYTES // self.x.itemsize
        *weights, x = (self._to(bench, array) for array in (*self.weights, self.x))
        arrays = [(array, (block, HALF_COLUMNS, 1)) for array in (weights * 2)[:2]]
        arrays += [(x, (block, rows)) for rows in (*ROWS, 1)]
        words = np.concatenate([self._map(*entry) for entry in arrays])
        return bench.array(words.size, granule=8, values=words).ctypes.data

    def _to(self, bench, array):
        return bench.array(array.size, array.dtype, values=array.reshape(-1)).reshape(array.shape)

    def _map(self, array, box):
        facts = dict(sizes=array.shape[::-1], strides=array.strides[-2::-1], box=box, steps=[1] * len(box))
        number = ELEMENTS[BITS[self.dtype]][0]
        return TensorMap(data_type=number, address=array.ctypes.data, swizzle=SWIZZLE_128B, **facts).words()

    def run(self, text=None, **schedule):
        """(sums, machine); `schedule` are options of the machine."""
        bench = Bench(num_bytes=16 << 20, most_steps=1 << 21, **schedule)
        maps = self._maps(bench)
        blocks = -(-self.depth * self.x.itemsize // DEPTH_BYTES)
        second_map = maps + 8 * MAP_WORDS * (self.parts - 1)
        gathered = self.order is not None
        row = bench.array(THREADS, granule=8, values=self.order).ctypes.data if gathered else self.a_row
        operands = [0, maps, row, *self.at, self.expert, blocks, second_map]
        text = main_loop(self.rows, self.dtype, gathered) if text is None else text
        return run_text(bench, text, self.rows, operands, gathered), bench.machine

    def expected(self):
        """`[rows, 128]`, zero where there is no row or column."""
        x = padded(self.x, self.rows, self.a_row) if self.order is None else self.x[self.order[: self.rows]]
        halves = [
            padded(w[self.expert], HALF_COLUMNS, at) for w, at in zip((self.weights * 2)[:2], self.at, strict=True)
        ]
        return x @ np.concatenate(halves).T


def padded(array, count, first):
    """`count` rows from `first` on in float64, zeros where there are none."""
    result = np.zeros((count, array.shape[1]))
    there = array[first : first + count]
    result[: len(there)] = there
    return result


def depths(dtype, rows):
    """Elements: less than a block, a ragged end, as many blocks as stages, one more, and several rounds of them."""
    block = DEPTH_BYTES // element_dtype(dtype).itemsize
    return [8, block + 8, STAGES[rows] * block, STAGES[rows] * block + 8, (2 * STAGES[rows] + 1) * block]


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_text_makes_the_product(dtype, rows, gated, gathered):
    for i, depth in enumerate(depths(dtype, rows)):
        tile = Tile(dtype, rows, depth, gated, seed=depth, gathered=gathered)
        for schedule in (AT_ONCE, dict(seed=i)):
            sums, machine = tile.run(**schedule)
            np.testing.assert_array_equal(sums, tile.expected(), f"{dtype}, {rows} rows, depth {depth}, {schedule}")
            assert machine.poisoned_rows == 0


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("rows", ROWS)
def test_every_byte_of_the_tile_is_copied_once(rows, gathered):
    depth = (STAGES[rows] + 2) * 64
    _, machine = Tile("float16", rows, depth, gated=False, gathered=gathered).run()
    [(text, executed)] = machine.executed.items()
    code = machine.program(text).code
    copied = {3: HALF_COLUMNS, 2: 1 if gathered else rows}  # rows of a box, by its dimensions
    copies = [
        (int(row[TARGET]), int(times))
        for row, times in zip(code, executed, strict=True)
        if row[CODE] == opcodes.COPY_BOX
    ]
    assert sum(times * copied[dimensions] for dimensions, times in copies) == (FULL + rows) * depth * 2 // DEPTH_BYTES


WRONG_SUMS = -1
FAULTS = [
    ("wgmma.wait_group.sync.aligned 1;", "wgmma.wait_group.sync.aligned 2;", faults.RACE),
    ("@done xor.b32 parity, parity, 1;", "", faults.RACE),
    ("add.u64 b, a, 1026;", "add.u64 b, a, 1028;", WRONG_SUMS),
    ("add.u64 a1, a, 514;", "add.u64 a1, a, 518;", WRONG_SUMS),
    ("mov.u32 at_before, at;", "", faults.RACE),
    ("add.s32 block, k, 5;", "add.s32 block, k, 6;", faults.STEP_LIMIT),
    ("st.shared.f32 [at+528], d1;", "st.shared.f32 [at+4], d1;", faults.RACE),
    ("mad.lo.u32 at, x, 64, at;", "mad.lo.u32 at, x, 128, at;", faults.RACE),
    (" 18432;\n@go cp", " 16384;\n@go cp", faults.MBARRIER_BYTES),
]


def outcome(tile, text, schedule):
    """The rule that was broken, WRONG_SUMS or None."""
    try:
        sums, _ = tile.run(text, **schedule)
    except PtxFault as fault:
        return fault.code
    return None if np.array_equal(sums, tile.expected()) else WRONG_SUMS


GATHERED_FAULTS = [
    ("setp.lt.u32 first, thread, 16;", "setp.lt.u32 first, thread, 15;", faults.STEP_LIMIT),
    ("setp.lt.u32 first, thread, 16;", "setp.lt.u32 first, thread, 17;", faults.MBARRIER_BYTES),
    ("mad.lo.u32 own_row, thread, 128, 16384;", "mad.lo.u32 own_row, thread, 0, 16384;", faults.RACE),
    ("setp.gt.and.s32 own, k, 0, first;", "setp.ge.s32 own, k, 0;", faults.RACE),
]


@pytest.mark.parametrize(("right", "wrong", "rule"), GATHERED_FAULTS)
def test_a_fault_planted_in_the_text_that_gathers_is_found(right, wrong, rule):
    tile, text = Tile("float16", 16, 13 * 64, gated=True, gathered=True), main_loop(16, "float16", gathered=True)
    assert right in text, "the text has changed: plant another fault"
    assert {outcome(tile, text, schedule) for schedule in SCHEDULES} == {None}
    found = {outcome(tile, text.replace(right, wrong), schedule) for schedule in SCHEDULES}
    assert rule in found and None not in found


@pytest.mark.parametrize(("right", "wrong", "rule"), FAULTS)
def test_a_fault_planted_in_the_text_is_found(right, wrong, rule):
    tile, text = Tile("float16", 16, 13 * 64, gated=True), main_loop(16, "float16")
    assert right in text, "the text has changed: plant another fault"
    assert {outcome(tile, text, schedule) for schedule in SCHEDULES} == {None}
    found = {outcome(tile, text.replace(right, wrong), schedule) for schedule in SCHEDULES}
    assert rule in found and None not in found


# single facts


@pytest.mark.parametrize("rows", ROWS)
def test_fragments_cover_the_tile_once(rows):
    places = {fragment(thread, i, half) for thread in range(THREADS) for half in range(2) for i in range(rows // 2)}
    assert places == {(row, column) for row in range(rows) for column in range(FULL)}
    for thread, i, half in ((0, 0, 0), (37, 5, 0), (127, rows // 2 - 1, 1)):
        m, n = tensors.fragment_place(thread, i)
        assert fragment(thread, i, half) == (n, half * HALF_COLUMNS + m)


@pytest.mark.parametrize("rows", ROWS)
def test_sums_are_stored_where_fragment_says(rows):
    lines = main_loop(rows, "float16").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("and.b32 x, thread, 3"))
    first = [
        f"{{ .reg .b32 d<{rows}>, thread, shared, x, at;",
        "mov.u32 thread, %tid.x; cvta.to.shared.u64 %rd10, $0; cvt.u32.u64 shared, %rd10;",
        *(f"mad.lo.u32 d{i}, thread, {rows}, {i};" for i in range(rows)),  # both halves
    ]
    sums = run_text(Bench(), "\n".join(first + lines[start:]), rows, [0] * NUM_OPERANDS).view(np.int32)
    for thread in range(THREADS):
        for i in range(rows):
            assert sums[fragment(thread, i % (rows // 2), i // (rows // 2))] == thread * rows + i
    stored = [line for line in lines if line.startswith("st.shared")]
    assert len(stored) == rows


@pytest.mark.parametrize("rows", ROWS)
def test_stages_fit_and_are_aligned(rows):
    stage_bytes = WEIGHT_BYTES + rows * DEPTH_BYTES
    assert stage_bytes % SHARED_ALIGNMENT == 0
    assert WEIGHT_BYTES // 2 % SHARED_ALIGNMENT == 0
    assert STAGES[rows] * stage_bytes <= BARRIERS_AT
    assert rows * SUMS_STRIDE * 4 <= BARRIERS_AT, "sums overlap the barriers"
    assert STAGES[rows] >= 3, "one is multiplied, one is being filled, one is ready"


def test_two_blocks_fit_a_multiprocessor():
    assert BARRIERS_AT % 8 == 0
    assert BARRIERS_AT + 8 * max(STAGES.values()) <= SHARED_BYTES
    assert 2 * (SHARED_BYTES + STATIC_BYTES + RESERVED_BYTES) <= MULTIPROCESSOR_SHARED_BYTES


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_instructions_of_the_loop(dtype, rows):
    text = main_loop(rows, dtype)
    before, loop = text.split("DEPTH${:uid}:")
    kind, depth, _ = INSTRUCTIONS[dtype]
    name = f"wgmma.mma_async.sync.aligned.m64n{rows}k{depth}.{kind} "
    assert loop.count(name) == loop.count("wgmma.mma_async") == 2 * DEPTH_BYTES // STEP_BYTES
    assert before.count("wgmma.mma_async") == 0
    assert depth * element_dtype(dtype).itemsize == STEP_BYTES
    assert before.count("cp.async.bulk") == 3 * STAGES[rows]
    assert loop.count("cp.async.bulk") == 3
    boxes = 2 * HALF_COLUMNS * DEPTH_BYTES + rows * DEPTH_BYTES
    announced = {int(number) for number in re.findall(r"expect_tx\S+ _, \[\w+\], (\d+);", text)}
    assert announced == {boxes}
    assert text.count("mbarrier.init") == text.count("mbarrier.inval") == STAGES[rows]


def test_what_ordinary_stores_wrote_is_fenced_before_the_first_copy():
    for rows in ROWS:
        text = main_loop(rows, "bfloat16")
        fence, sync, copy = (text.index(part) for part in ("\nfence.proxy.async;", "bar.sync", "cp.async.bulk"))
        assert fence < sync < copy


def test_the_descriptor_says_swizzle_and_stride():
    start, _, stride, base_offset, swizzle = tensors.descriptor_fields(hopper._DESCRIPTOR)
    assert (start, stride, base_offset, swizzle) == (0, 1024, 0, tensors.DESCRIPTOR_SWIZZLE_128B)
    assert SHARED_BYTES + STATIC_BYTES + RESERVED_BYTES <= 0x3FFF << 4, "an address has 14 bits of 16 bytes"
