"""The Hopper tile without a GPU: where TMA writes, what a descriptor reads, and where sums go, by a model of each.

The model is written from the manuals (PTX ISA: wgmma's layouts and descriptors, TMA's 128-byte swizzle), not from
hopper.py; offsets, steps and addresses are read off the PTX text.
"""

import re

import numpy as np
import pytest

from flashmoe_numba.tile_gemm.hopper import (
    BARRIERS_AT,
    DEPTH_BYTES,
    ROWS,
    SHARED_BYTES,
    STAGES,
    STEP_BYTES,
    THREADS,
    WEIGHT_BYTES,
    fragment,
    main_loop,
)
from flashmoe_numba.tile_gemm.matrices import MAX_TILE_COLUMNS, SUMS_STRIDE

MULTIPROCESSOR_BYTES, RESERVED_BYTES = 233_472, 1024


def swizzled(address):
    """TMA's 128-byte swizzle, and wgmma's: bits 4 to 6 of an address are flipped by bits 7 to 9."""
    return address ^ ((address >> 7 & 7) << 4)


def tma_box(memory, at, box):
    """Write a box `[rows, DEPTH_BYTES]` of bytes to shared memory."""
    for row, data in enumerate(box):
        for byte, value in enumerate(data):
            memory[swizzled(at + row * DEPTH_BYTES + byte)] = value


def operand(memory, descriptor, num_rows):
    """What wgmma reads by a descriptor: `[num_rows, 16]` float16, K-major."""
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    assert descriptor >> 62 == 1, "the 128-byte swizzle"
    rows = np.empty((num_rows, STEP_BYTES), np.uint8)
    for row in range(num_rows):
        first = start + row // 8 * stride + row % 8 * DEPTH_BYTES
        rows[row] = [memory[swizzled(first + byte)] for byte in range(STEP_BYTES)]
    return rows.view(np.float16).astype(np.float64)


def constants(text):
    """(descriptor's constant, [(a0, a1, b) of each step])"""
    constant = int(re.search(r"or\.b64 a, a, (\d+);", text)[1])
    steps = [tuple(int(n) for n in found) for found in re.findall(
        r"add\.u64 a0, a, (\d+);\s+add\.u64 a1, a, (\d+);\s+add\.u64 b, a, (\d+);", text
    )]  # fmt: skip
    return constant, steps


@pytest.mark.parametrize("rows", ROWS)
def test_a_stage_is_read_as_it_was_written(rows):
    rng = np.random.default_rng(rows)
    text, shared = main_loop(rows, "float16"), 2048
    weights, x = (rng.integers(-8, 9, (n, DEPTH_BYTES // 2)).astype(np.float16) for n in (MAX_TILE_COLUMNS, rows))
    memory = np.zeros(1 << 16, np.uint8)
    places = sorted({int(at) for at in re.findall(r"\[at\+(\d+)\], \[(?:\$1|\$7|rowmap)", text)})
    assert places == [0, WEIGHT_BYTES // 2, WEIGHT_BYTES]
    for place, box in zip(places, (*np.split(weights, 2), x), strict=True):
        tma_box(memory, shared + place, np.ascontiguousarray(box).view(np.uint8))
    constant, steps = constants(text)
    assert len(steps) == DEPTH_BYTES // STEP_BYTES
    halves = np.zeros((2, MAX_TILE_COLUMNS // 2, rows))
    for a0, a1, b in steps:
        base = (shared >> 4) | constant
        for half, a in enumerate((a0, a1)):
            halves[half] += operand(memory, base + a, MAX_TILE_COLUMNS // 2) @ operand(memory, base + b, rows).T
    expected = weights.astype(np.float64) @ x.astype(np.float64).T
    np.testing.assert_array_equal(halves.reshape(MAX_TILE_COLUMNS, rows), expected)


@pytest.mark.parametrize("rows", ROWS)
def test_every_sum_is_in_one_register_of_one_thread(rows):
    cells = {fragment(thread, i, half) for thread in range(THREADS) for i in range(rows // 2) for half in range(2)}
    assert cells == {(row, column) for row in range(rows) for column in range(MAX_TILE_COLUMNS)}
    assert len(cells) == THREADS * rows


@pytest.mark.parametrize("rows", ROWS)
def test_sums_are_stored_where_the_epilogue_reads_them(rows):
    """wgmma's layout from the manual: row group, lane and pair of a thread; addresses from the text."""
    text = main_loop(rows, "bfloat16")
    row_bytes, column_bytes, warp_bytes = (
        int(re.search(pattern, text)[1])
        for pattern in (
            r"and\.b32 x, thread, 3;\s+mul\.lo\.u32 at, x, (\d+);",
            r"and\.b32 x, thread, 31;\s+shr\.u32 x, x, 2;\s+mad\.lo\.u32 at, x, (\d+), at;",
            r"shr\.u32 x, thread, 5;\s+mad\.lo\.u32 at, x, (\d+), at;",
        )
    )
    stores = [(int(at), int(d)) for at, d in re.findall(r"st\.shared\.f32 \[at\+(\d+)\], d(\d+);", text)]
    assert sorted(d for _, d in stores) == list(range(rows))
    for thread in (0, 1, 5, 31, 32, 77, 127):
        base = thread % 4 * row_bytes + thread % 32 // 4 * column_bytes + thread // 32 * warp_bytes
        for at, d in stores:
            half, i = divmod(d, rows // 2)
            column = 64 * half + 16 * (thread // 32) + thread % 32 // 4 + (8 if i % 4 >= 2 else 0)
            row = 8 * (i // 4) + 2 * (thread % 4) + i % 2
            assert base + at == 4 * (row * SUMS_STRIDE + column)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rows", ROWS)
def test_counts(rows, dtype):
    text, steps = main_loop(rows, dtype), DEPTH_BYTES // STEP_BYTES
    stage_bytes = WEIGHT_BYTES + rows * DEPTH_BYTES
    assert text.count("wgmma.mma_async") == 2 * steps
    depth = STEP_BYTES // (4 if dtype == "float32" else 2)
    assert text.count(f"m64n{rows}k{depth}.f32.") == 2 * steps
    assert {int(n) for n in re.findall(r"expect_tx\.shared::cta\.b64 _, \[\w+\], (\d+);", text)} == {stage_bytes}
    assert text.count("mbarrier.init") == text.count("mbarrier.inval") == STAGES[rows]
    assert text.count("cp.async.bulk.tensor") == 3 * (STAGES[rows] + 1)
    block = DEPTH_BYTES // (4 if dtype == "float32" else 2)
    assert {int(n) for n in re.findall(r"mul\.lo\.s32 x, block, (\d+);", text)} == {block}


def test_sizes():
    for rows in ROWS:
        stage_bytes = WEIGHT_BYTES + rows * DEPTH_BYTES
        assert stage_bytes % 1024 == 0, "a stage begins where the swizzle does"
        assert STAGES[rows] * stage_bytes <= BARRIERS_AT
        assert 4 * rows * SUMS_STRIDE <= BARRIERS_AT, "sums lie over stages, not over barriers"
    assert BARRIERS_AT % 8 == 0
    static_bytes = 1024
    assert 2 * (SHARED_BYTES + static_bytes + RESERVED_BYTES) <= MULTIPROCESSOR_BYTES, "two blocks"
