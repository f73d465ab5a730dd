"""Weight gradients against chains of multiply-adds, bit for bit, and the promise that follows: nothing but the order of
the rows decides an element's bits.
"""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from test_guard_pages import at_the_end, at_the_start, in_a_child
from test_micro_kernels import fused32, fused64

from flashmoe_numba.backends.cpu import CpuBackend
from flashmoe_numba.device.compilation import interpreted
from flashmoe_numba.device.cpu import JIT_OPTIONS
from flashmoe_numba.device.fibers import Scheduler
from flashmoe_numba.device.storage import as_storage
from flashmoe_numba.heap.host import HostMemory
from flashmoe_numba.tile_gemm import GRADIENT_COLUMNS, GRADIENT_ROWS, Runs, Scratch, weight_gradient
from flashmoe_numba.tile_gemm.cpu import panel_width
from flashmoe_numba.tile_gemm.cpu_gradients import STREAM_BYTES
from flashmoe_numba.tile_gemm.matrices import STAGE_ELEMENTS, SUMS_ELEMENTS
from flashmoe_numba.tile_gemm.micro_kernel import DEPTH_BLOCK, FUSED, MICRO_ROWS, VECTOR_BYTES
from reference import MoEConfig, element_dtype
from reference.formats import FORMATS

TARGETS = ("cpu", "fibers", "lanes")
SENTINEL = 77


def add(
    out, out_at, out_stride, left, left_stride, left_at, num_left,
    right, right_stride, right_at, num_right, runs, fresh, scratch,
):  # fmt: skip
    weight_gradient(
        out, out_at, out_stride, left, left_stride, left_at, num_left,
        right, right_stride, right_at, num_right, runs, fresh, scratch,
    )  # fmt: skip


compiled = njit(**JIT_OPTIONS)(add)


def on_fibers(function, lanes, *arguments):
    scheduler = Scheduler(seed=lanes)
    scheduler.add_block("test", function, arguments, lanes)
    scheduler.run()


def accumulator_of(dtype):
    return np.dtype(np.float64 if dtype == "float64" else np.float32)


def make_scratch(target, accumulator):
    if target == "lanes":
        scratch = Scratch(np.empty(STAGE_ELEMENTS, accumulator), np.empty(SUMS_ELEMENTS, accumulator))
    else:
        backend = CpuBackend()
        sizes = dict(num_ranks=1, num_tokens=1, hidden=1, ffn=1, num_experts=1, num_topk=1)
        scratch = backend.make_scratch(MoEConfig(**sizes, dtype=accumulator.name))
        backend.close()
    for array in scratch:
        array[:] = np.nan
    return scratch


def function_of(target):
    if target == "cpu":
        return compiled
    if target == "fibers":
        return partial(on_fibers, add, 2)
    return partial(on_fibers, interpreted("flashmoe_numba.tile_gemm.lanes").add_outer_products, 128)


def gradient(
    target, begin, left, right, runs, block=(GRADIENT_ROWS, GRADIENT_COLUMNS), place=lambda array: array, fresh=False
):
    """`begin` plus left.T @ right over the rows of each of `runs`, a call for each; in larger arrays, in blocks.

    Args:
        begin: accumulator `[num_left, num_right]`.
        left, right: elements or accumulator, `[rows, num_left]` and `[rows, num_right]`.
        fresh: does the first call begin with 0?
        runs: lists of (first row, number of rows).
    """
    function, scratch = function_of(target), Scratch(*map(place, make_scratch(target, begin.dtype)))
    (num_left, num_right), stride = begin.shape, begin.shape[1] + 3
    out = np.full((num_left + 1, stride), SENTINEL, begin.dtype)
    out[1:, 2:-1] = begin
    out = place(out.reshape(-1)[: out.size - 1])  # the last row ends with the last element
    sides = [np.concatenate([np.full((len(side), 2), np.nan, side.dtype), side], axis=1) for side in (left, right)]
    sides = [place(as_storage(side)) for side in sides]
    for call, of_call in enumerate(runs):
        words = np.zeros(2 + 2 * len(of_call), np.int64)
        words[1 : 1 + 2 * len(of_call) : 2], words[2 : 2 + 2 * len(of_call) : 2] = np.reshape(of_call, (-1, 2)).T
        first, rows = place(words), place(words[1:].copy())  # run q at word 1 + 2 q of both
        for i in range(0, num_left, block[0]):
            for j in range(0, num_right, block[1]):
                function(
                    out, (1 + i) * stride + 2 + j, stride, sides[0], num_left + 2, 2 + i, min(block[0], num_left - i),
                    sides[1], num_right + 2, 2 + j, min(block[1], num_right - j),
                    Runs(first, rows, 1, 2, len(of_call)), fresh and call == 0, scratch,
                )  # fmt: skip
    whole = np.append(out, begin.dtype.type(SENTINEL)).reshape(num_left + 1, stride)
    got = whole[1:, 2:-1].copy()
    whole[1:, 2:-1] = SENTINEL
    assert (whole == SENTINEL).all(), "written beside the block"
    return got


def expected_chain(begin, left, right, runs):
    """One chain of fused multiply-adds for each element, from `begin` on, in the order of the rows."""
    sums, real = begin.copy(), begin.dtype
    for first, rows in [run for of_call in runs for run in of_call]:
        for r in range(first, first + rows):
            a, b = np.broadcast_arrays(left[r].astype(real)[:, None], right[r].astype(real))
            sums = fused32(a, b, sums) if real == np.float32 else fused64(a, b, sums).astype(real)
    return sums


def make_sides(rows, num_left, num_right, dtypes, seed=0):
    """(begin, left, right) of normal numbers; the sums are of the first dtype's accumulator."""
    rng = np.random.default_rng(seed)
    sides = [
        rng.standard_normal((rows, width)).astype(element_dtype(dtype))
        for width, dtype in zip((num_left, num_right), dtypes, strict=True)
    ]
    return rng.standard_normal((num_left, num_right)).astype(accumulator_of(dtypes[0])), *sides


def pairs_of_dtypes():
    """A side has the element type or that of sums: gradients of logits, and norms, are never rounded."""
    return [(dtype, other) for dtype in DTYPES for other in dict.fromkeys((dtype, accumulator_of(dtype).name))]


@pytest.mark.skipif(not FUSED, reason="this CPU has no fused multiply-add")
@pytest.mark.parametrize("dtypes", pairs_of_dtypes())
def test_cpus_make_one_chain_of_fused_multiply_adds(dtypes):
    """Heights and panels that are not full, more rows than a block of them, runs that are empty and end anywhere."""
    deep = DEPTH_BLOCK + 9
    for num_left, num_right, runs in (
        (1, 1, [[(0, 1)]]),
        (7, 19, [[(3, 5), (0, 0), (1, 2)]]),
        (13, 67, [[(0, 7)], [(7, 1), (2, 3)]]),
        (6, 32, [[(4, 3)]]),
        (3, 5, [[(0, deep)]]),
        (2, 33, [[(5, DEPTH_BLOCK - 3), (1, 3), (0, 2)]]),
    ):
        rows = max(first + number for of_call in runs for first, number in of_call)
        for pair in (dtypes, dtypes[::-1]):
            begin, left, right = make_sides(rows, num_left, num_right, pair)
            begin = begin.astype(accumulator_of(dtypes[0]))
            got = gradient("cpu", begin, left, right, runs)
            assert_same_bits(got, expected_chain(begin, left, right, runs), f"{pair}, {num_left} x {num_right}, {runs}")


@pytest.mark.parametrize("dtypes", pairs_of_dtypes())
@pytest.mark.parametrize("target", TARGETS)
def test_gradients_equal_long_doubles(target, dtypes):
    """A chain of r multiply-adds is off by at most r u of the sum of all sizes, one of products and sums by 2 r u."""
    for num_left, num_right, runs in ((5, 7, [[(0, 3)]]), (34, 17, [[(2, 37), (0, 2)]]), (3, 66, [[(0, 1), (1, 33)]])):
        rows = max(first + number for of_call in runs for first, number in of_call)
        begin, left, right = make_sides(rows, num_left, num_right, dtypes, seed=1)
        order = [r for of_call in runs for first, number in of_call for r in range(first, first + number)]
        a, b = (side[order].astype(np.longdouble) for side in (left, right))
        u, size = FORMATS[begin.dtype.name].unit_roundoff, np.abs(a).T @ np.abs(b) + np.abs(begin)
        off = np.abs(gradient(target, begin, left, right, runs) - (begin + a.T @ b)) / (2 * len(order) * u * size)
        assert off.max() <= 1, f"{dtypes}, {num_left} x {num_right}: off by {off.max():.3g} bounds"


@pytest.mark.parametrize("target", TARGETS)
def test_no_rows_change_nothing(target):
    begin, left, right = make_sides(4, 5, 9, ("float32", "float32"))
    left[:], begin[2, 3] = np.nan, -0.0
    for runs in ([], [[]], [[(2, 0)]], [[(0, 0), (4, 0)]]):
        assert_same_bits(gradient(target, begin, left, right, runs), begin, f"{target}, {runs}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_fresh_sums_begin_with_zeros_whatever_there_is(target, dtype):
    """In the first call, and in its first block of rows; panels full and not."""
    deep = DEPTH_BLOCK + 3 if target == "cpu" else 9
    for num_left, num_right, runs in ((5, 67, [[(1, 2)], [(0, 1), (3, 2)]]), (13, 32, [[(0, 0), (0, deep)]])):
        rows = max(first + number for of_call in runs for first, number in of_call)
        begin, left, right = make_sides(rows, num_left, num_right, (dtype, dtype), seed=3)
        zeros = gradient(target, np.zeros_like(begin), left, right, runs)
        begin[:], begin[1, 2] = np.nan, np.inf
        assert_same_bits(gradient(target, begin, left, right, runs, fresh=True), zeros, f"{target}, {runs}")


@pytest.mark.parametrize("at", [1024, 1024 + 3])  # in lines of the cache, and not
def test_large_fresh_sums_are_streamed(at):
    """Past the caches, whole panels of full height; more rows than a block of them go on with the sums."""
    num_left, num_right, stride = 2 * MICRO_ROWS + 3, 2 * panel_width(np.dtype(np.float32)) + 5, 1024
    out = HostMemory().empty(STREAM_BYTES // 4, np.float32)
    for rows in (3, DEPTH_BLOCK + 2):
        begin, left, right = make_sides(rows, num_left, num_right, ("float32", "float32"), seed=4)
        expected = gradient("cpu", np.zeros_like(begin), left, right, [[(0, rows)]])
        out[:] = SENTINEL
        compiled(
            out, at, stride, left.reshape(-1), num_left, 0, num_left, right.reshape(-1), num_right, 0, num_right,
            Runs(np.zeros(1, np.int64), np.array([rows]), 0, 1, 1), True, make_scratch("cpu", begin.dtype),
        )  # fmt: skip
        block = np.lib.stride_tricks.as_strided(out[at:], begin.shape, (4 * stride, 4))
        assert_same_bits(block, expected, f"{rows} rows at {at}")
        block[:] = SENTINEL
        assert (out == SENTINEL).all(), "written beside the block"
    if VECTOR_BYTES > 16:
        assert "vmovntps" in "".join(compiled.inspect_asm().values())


@st.composite
def cuts(draw, rows):
    """All rows in their order: calls of runs."""
    ends = sorted({*draw(st.lists(st.integers(0, rows), max_size=5)), 0, rows})
    runs = [(first, end - first) for first, end in pairwise(ends)]
    at = draw(st.integers(0, len(runs)))
    return [of_call for of_call in (runs[:at], [(rows, 0)], runs[at:]) if of_call]


def check_cuts(target, data, most_rows, most_columns):
    rows, columns = data.draw(st.integers(0, most_rows)), st.integers(1, most_columns)
    dtype = data.draw(st.sampled_from(DTYPES))
    begin, left, right = make_sides(rows, data.draw(columns), data.draw(columns), (dtype, dtype))
    whole = gradient(target, begin, left, right, [[(0, rows)]])
    block, runs = (data.draw(columns), data.draw(columns)), data.draw(cuts(rows))
    assert_same_bits(gradient(target, begin, left, right, runs, block), whole, f"{dtype}, {runs}, blocks of {block}")


@given(st.data())
def test_bits_depend_on_the_order_of_rows_only(data):
    check_cuts("cpu", data, 2 * DEPTH_BLOCK + 5, 70)


@settings(max_examples=settings().max_examples // 4)
@given(st.sampled_from(["fibers", "lanes"]), st.data())
def test_interpreted_bits_depend_on_the_order_of_rows_only(target, data):
    check_cuts(target, data, 40, 9)


def test_a_whole_block_of_many_rows():
    """As large as a call takes, integers that round nowhere."""
    rng = np.random.default_rng(2)
    rows = DEPTH_BLOCK + 1
    left, right = (rng.integers(-2, 3, (rows, n)).astype(np.float32) for n in (GRADIENT_ROWS, GRADIENT_COLUMNS))
    begin = np.ones((GRADIENT_ROWS, GRADIENT_COLUMNS), np.float32)
    np.testing.assert_array_equal(gradient("cpu", begin, left, right, [[(0, rows)]]), left.T @ right + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_touches_its_own_memory_only(dtype):
    cases = [(13, 67, 5), (GRADIENT_ROWS, GRADIENT_COLUMNS, 3), (6, 31, DEPTH_BLOCK + 2)]
    sides = [make_sides(rows, num_left, num_right, (dtype, dtype)) for num_left, num_right, rows in cases]
    expected = [gradient("cpu", *arrays, [[(0, 2), (2, len(arrays[1]) - 2)]]) for arrays in sides]

    def check():
        for place in (at_the_end, at_the_start):
            for arrays, result in zip(sides, expected, strict=True):
                got = gradient("cpu", *arrays, [[(0, 2), (2, len(arrays[1]) - 2)]], place=place)
                assert_same_bits(got, result, f"{dtype}, {arrays[0].shape}")

    in_a_child(check)
