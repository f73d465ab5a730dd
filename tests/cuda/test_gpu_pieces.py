"""Single pieces on a GPU: tile sums of both kinds, whole tiles, copies, atomics, signals, records."""

from functools import cache

import numpy as np
import pytest
from cases import DTYPES, bits
from gpu_cases import tensor_config
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import (
    Copy,
    Launcher,
    Product,
    Rows,
    Sums,
    Words,
    copy_piece,
    count,
    ping_pong,
    product_piece,
    rows_piece,
    sums_piece,
    words_piece,
)

from flashmoe_numba.device.storage import as_storage
from flashmoe_numba.tile_gemm import make_form
from flashmoe_numba.tile_gemm.hopper import ROWS, SHARED_BYTES
from flashmoe_numba.tile_gemm.matrices import PASS_ROWS, STAGE_ELEMENTS, SUMS_ELEMENTS, SUMS_STRIDE
from reference import ExpertKind, activation, element_dtype

EXPERTS, COLUMNS, A_ROW = 3, 200, 5
SMALL_SHARED = 8 * (SUMS_ELEMENTS + STAGE_ELEMENTS)


@pytest.fixture(scope="module")
def launcher(gpu):
    """Launchers by the piece's maker and its arguments, each built once."""

    @cache
    def get(make, *arguments):
        piece = make(*arguments)
        tensor_cores = arguments[-1] is True
        return Launcher(gpu, piece, SHARED_BYTES if tensor_cores else SMALL_SHARED)

    return get


class Operands:
    """Integers, so that sums are exact in any order, and one tile of their product."""

    def __init__(self, gpu, dtype, tensor_cores, rows, depth, gated, seed=0):
        from flashmoe_numba.backends.cuda import CudaBackend

        rng = np.random.default_rng(seed)
        element, self.rows, self.depth, self.parts = element_dtype(dtype), rows, depth, 1 + gated
        make = [(EXPERTS, COLUMNS, depth)] * self.parts
        self.weights = [rng.integers(-3, 4, shape).astype(element) for shape in make]
        self.biases = [rng.integers(-3, 4, shape[:2]).astype(element) for shape in make]
        self.x = rng.integers(-3, 4, (A_ROW + rows, depth)).astype(element)
        config = tensor_config(dtype=dtype)
        backend = CudaBackend(config, gpu, tf32=True)
        assert backend.variant.tensor_cores == tensor_cores or not tensor_cores
        self.a = gpu.to_device(as_storage(self.x))
        rows_of_maps = self.a if tensor_cores else None
        tile_n = 128 // self.parts
        self.matrices = backend.pack(self.weights, self.biases, tile_n, config.accumulator, rows_of_maps)

    def exact(self, expert, first, columns):
        """`[parts, rows, columns]`"""
        x = self.x[A_ROW:].astype(np.float64)
        return [x @ w[expert, first : first + columns].astype(np.float64).T for w in self.weights]


def check_sums(gpu, run, operands):
    accumulator = operands.matrices.bias.dtype
    for expert in range(EXPERTS):
        for first in range(0, COLUMNS, operands.matrices.tile_n):
            columns = min(operands.matrices.tile_n, COLUMNS - first)
            out = gpu.zeros(operands.rows * SUMS_STRIDE, accumulator)
            where = (operands.rows, A_ROW, expert, first, columns)
            run(Sums(*where, operands.a, operands.matrices, out))
            got = gpu.to_host(out).reshape(operands.rows, SUMS_STRIDE)
            for part, expected in enumerate(operands.exact(expert, first, columns)):
                at = part * operands.matrices.tile_n
                case = f"expert {expert}, columns from {first}, part {part}, {operands.rows} rows of {operands.depth}"
                np.testing.assert_array_equal(got[:, at : at + columns], expected, case)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("height", ROWS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_sums_by_tensor_cores(hopper, launcher, dtype, height, gated):
    """Every height, full and not; the depth from less than a block to several rounds of all stages."""
    run = launcher(sums_piece, dtype, True)
    for rows in (height, height // 2 + 1):
        for depth in (8, 64, 72, 200, 1024):
            check_sums(hopper, run, Operands(hopper, dtype, True, rows, depth, gated, seed=depth))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_by_lanes(gpu, launcher, dtype, gated):
    run = launcher(sums_piece, dtype, False)
    for rows in (1, 5, PASS_ROWS):
        for depth in (1, 31, 32, 33, 100):
            check_sums(gpu, run, Operands(gpu, dtype, False, rows, depth, gated, seed=depth))


def check_product(gpu, run, operands, dtype, name):
    """Integers again: with relu or identity even the rounding is exact."""
    expert, n, tile_n = 1, 1, operands.matrices.tile_n
    columns = min(tile_n, COLUMNS - n * tile_n)
    out = gpu.to_device(as_storage(np.zeros((operands.rows + 2, COLUMNS), element_dtype(dtype))))
    form = make_form(ExpertKind(activation=name, gated=operands.parts == 2), operands.matrices.bias.dtype)
    where = (operands.rows, A_ROW, 1, expert, n, form)
    run(Product(*where, operands.a, operands.matrices, out))
    got = gpu.to_host(out).view(element_dtype(dtype)).reshape(-1, COLUMNS)
    exact = operands.exact(expert, n * tile_n, columns)
    biased = [
        product + bias[expert, n * tile_n : n * tile_n + columns].astype(np.float64)
        for product, bias in zip(exact, operands.biases, strict=True)
    ]
    expected = np.zeros(got.shape)
    tile = activation(name, biased[0]) * (biased[1] if operands.parts == 2 else 1)
    expected[1:-1, n * tile_n : n * tile_n + columns] = tile
    np.testing.assert_array_equal(got, expected.astype(element_dtype(dtype)), f"{dtype}, {name}, {operands.rows} rows")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tiles_by_tensor_cores(hopper, launcher, dtype, gated):
    run = launcher(product_piece, dtype, True)
    for rows in (1, 16, 33, 128, 200):  # more than 128 rows are multiplied in groups
        for name in ("identity", "relu"):
            check_product(hopper, run, Operands(hopper, dtype, True, rows, 72, gated), dtype, name)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_by_lanes(gpu, launcher, dtype, gated):
    run = launcher(product_piece, dtype, False)
    for rows in (1, 33, 70):
        for name in ("identity", "relu"):
            check_product(gpu, run, Operands(gpu, dtype, False, rows, 40, gated), dtype, name)


@settings(max_examples=3 * settings().max_examples)
@given(
    st.sampled_from(["float16", "float64"]),
    st.integers(0, 17),
    st.integers(0, 17),
    st.sampled_from([0, 1, 7, 8, 16, 1000, 1024, 5120]),
)
def test_rows_are_copied_whatever_their_alignment(gpu, launcher, dtype, target_at, source_at, num_elements):
    run, rng = launcher(copy_piece, dtype), np.random.default_rng(0)
    source = rng.standard_normal(6000).astype(dtype)
    target = gpu.to_device(as_storage(np.full(6000, 7, dtype)))
    run(Copy(target_at, source_at, num_elements, target, gpu.to_device(as_storage(source))))
    expected = np.full(6000, 7, dtype)
    expected[target_at : target_at + num_elements] = source[source_at : source_at + num_elements]
    np.testing.assert_array_equal(bits(gpu.to_host(target).view(dtype)), bits(expected))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("columns", "source_at", "target_at"), [(40, 0, 0), (40, 1, 0), (40, 0, 1), (33, 0, 0)])
def test_sums_of_rows_whatever_their_alignment(gpu, launcher, dtype, columns, source_at, target_at):
    element, rng = element_dtype(dtype), np.random.default_rng(0)
    source = rng.integers(-9, 10, source_at + 2 * columns).astype(element)
    target = gpu.to_device(as_storage(np.full(target_at + columns + 8, 7, element)))
    rows = gpu.to_device(as_storage(source))[source_at:]
    launcher(rows_piece, dtype)(Rows(columns, target[target_at:], rows, gpu.to_device(np.array([2.0, -0.5]))))
    expected = np.full(target_at + columns + 8, 7, np.float64)
    first, second = source[source_at:].astype(np.float64).reshape(2, columns)
    expected[target_at : target_at + columns] = 2 * first - second / 2
    np.testing.assert_array_equal(gpu.to_host(target).view(element).astype(np.float64), expected)


def test_atomics_of_all_threads(gpu, launcher):
    turns, num_blocks = 50, 64
    words = gpu.zeros(16, np.int64)
    launcher(words_piece, count)(Words(turns, words), num_blocks)
    total, first, winners = gpu.to_host(words)[:3].tolist()
    assert total == turns * num_blocks * 128
    assert 1 <= first <= 128
    assert winners == 1


def test_a_release_publishes_what_was_written_before(gpu, launcher):
    turns = 2000
    words = gpu.zeros(128, np.int64)
    launcher(words_piece, ping_pong)(Words(turns, words), 2)
    got = gpu.to_host(words)
    assert (got[0], got[16], got[64]) == (turns, turns, 0)
    assert (got[82:84] > got[80:82]).all(), "the clock stands"


def test_words_written_beside_a_kernel(gpu):
    words = gpu.zeros(4, np.int64)
    gpu.synchronize()
    gpu.write_word(gpu.address(words) + 16, -(2**40))
    assert gpu.read_now(gpu.address(words), words.size).tolist() == [0, 0, -(2**40), 0]
