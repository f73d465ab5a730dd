"""Single pieces of the kernel as kernels of their own, so that a failure of the layer can be put down to one of them.

A piece is a function of a record (a named tuple of integers and arrays), `scratch` and `box`, over the device
vocabulary. It is built as the layer's kernel is, and finds its record in a table in the GPU's memory, too. Building
needs no GPU: `python tests/cuda/pieces.py` builds them all.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from flashmoe_numba.build.variants import ARCHITECTURES
from flashmoe_numba.device import (
    add_part,
    block_sync,
    cas,
    copy_row,
    fetch_add,
    lane,
    lanes,
    ld_acquire,
    now,
    part_columns,
    pause,
    st_release,
    store_part,
    zero_sums,
)
from flashmoe_numba.device.records import record_words
from flashmoe_numba.device.storage import storage_dtype
from flashmoe_numba.tile_gemm import IN_ORDER, Form, Rooms, as_matrices, linear_form, tile_gemm
from flashmoe_numba.tile_gemm import Rows as GemmRows
from flashmoe_numba.tile_gemm.hopper import MAP_WORDS, NUM_MAPS, THREADS, tma_matrices
from flashmoe_numba.tile_gemm.matrices import SUMS_STRIDE
from flashmoe_numba.tile_gemm.stub import tile_sums
from reference import element_dtype

MOST_POLLS = 1 << 22  # some seconds: a signal that does not come shows as a wrong value and not as a hang


class Sums(NamedTuple):
    """One tile's sums: `out` takes `[rows, SUMS_STRIDE]`."""

    rows: int
    a_row: int
    expert: int
    first: int
    columns: int
    a: Any
    matrices: Any
    out: Any


class Product(NamedTuple):
    """One tile's results, with epilogue."""

    rows: int
    a_row: int
    out_row: int
    expert: int
    n: int
    form: Form
    a: Any
    matrices: Any
    out: Any


class Copy(NamedTuple):
    target_at: int
    source_at: int
    num_elements: int
    target: Any
    source: Any


class Rows(NamedTuple):
    """Two rows, and their weights as float64."""

    columns: int
    target: Any
    source: Any
    weights: Any


class Words(NamedTuple):
    turns: int
    words: Any


def sums(r, scratch, box):
    tile_sums(GemmRows(r.a, r.a_row, box, IN_ORDER), 0, r.rows, r.matrices, r.expert, r.first, r.columns, scratch)
    block_sync()
    for i in range(lane(), r.rows * SUMS_STRIDE, lanes()):
        r.out[i] = scratch.sums[i]


def product(r, scratch, box):
    out = Rooms(r.out, r.out_row, box, IN_ORDER, box, 0)
    nothing, a = Rooms(r.out[:0], 0, box, IN_ORDER, box, 0), GemmRows(r.a, r.a_row, box, IN_ORDER)
    tile_gemm(out, nothing, a, r.rows, r.matrices, r.expert, r.n, r.form, scratch)


def copy(r, scratch, box):
    copy_row(r.target, r.target_at, r.source, r.source_at, r.num_elements)


def sum_rows(r, scratch, box):
    """The weighted sum of both, as a combine makes it."""
    width = part_columns(r.target, r.source, r.columns)
    for at in range(lane() * width, r.columns, lanes() * width):
        columns = min(width, r.columns - at)
        sums = zero_sums(scratch.sums, columns)
        for row in range(2):
            weight = scratch.sums.dtype.type(r.weights[row])
            add_part(sums, columns, r.source, row * r.columns + at, weight)
        store_part(r.target, at, sums, columns)


def count(r, scratch, box):
    """Every thread of every block adds one to word 0, and tries to be the first to set word 1."""
    for _ in range(r.turns):
        fetch_add(r.words, 0, 1)
    if cas(r.words, 1, 0, lane() + 1) == 0:
        fetch_add(r.words, 2, 1)


def ping_pong(r, scratch, box):
    """Two blocks take turns: each writes a plain word and releases, and the other acquires and reads it.

    Words: 0 and 16 the turns, 32 and 48 what is passed, 64 how often it was not what it should be, 80 and 81 times.
    """
    if lane() == 0:
        box[0] = fetch_add(r.words, 96, 1)
    block_sync()
    me = box[0]
    other = 1 - me
    if lane() == 0:
        r.words[80 + me] = now()
        for turn in range(1, r.turns + 1):
            if me == 1 or turn > 1:
                wanted = turn if me == 1 else turn - 1
                attempt = 0
                while ld_acquire(r.words, 16 * other) < wanted and attempt < MOST_POLLS:
                    attempt = pause(attempt)
                if r.words[32 + 16 * other] != 1000 * wanted + other:
                    fetch_add(r.words, 64, 1)
            r.words[32 + 16 * me] = 1000 * turn + me
            st_release(r.words, 16 * me, turn)
        r.words[82 + me] = now()


class Piece(NamedTuple):
    """A function, and a record of the types for which it is built."""

    function: Callable[..., None]
    like: Any
    accumulator: np.dtype


def build(piece: Piece, architecture: str, file: Path) -> str:
    """Write the cubin to a file; returns the entry's name."""
    import re

    from numba import typeof

    from flashmoe_numba.build.entry import ROWS_AT, SHARED_ALIGNMENT
    from flashmoe_numba.device import array_at, jit
    from flashmoe_numba.device.cuda import record_at, undefined
    from flashmoe_numba.device.cuda_api import compile_to_ltoir, cuda, link, types
    from flashmoe_numba.tile_gemm import Scratch

    function, like = jit(piece.function), undefined(typeof(piece.like))
    accumulator = typeof(np.empty(0, piece.accumulator)).dtype

    def entry(table_address, num_words):
        box = cuda.shared.array(8, types.int64)
        shared = cuda.shared.array(0, accumulator, alignment=SHARED_ALIGNMENT)
        table = array_at(table_address, num_words, box)
        function(record_at(table, 0, like()), Scratch(shared[ROWS_AT:], shared), box)

    codes = compile_to_ltoir(entry, (types.int64, types.int64), ARCHITECTURES[architecture], (THREADS, 2))
    cubin, _ = link(codes, architecture)
    file.write_bytes(cubin)
    (name,) = set(re.findall(rb"\.text\.(\w+)", cubin))
    return name.decode()


class Launcher:
    """A piece on a GPU."""

    def __init__(self, gpu, piece, shared_bytes):
        from flashmoe_numba.build.variants import architecture_of

        self.gpu, self.shared_bytes = gpu, shared_bytes
        with TemporaryDirectory() as folder:
            file = Path(folder) / "piece.cubin"
            name = build(piece, architecture_of(gpu.capability), file)
            self.function = gpu.load(file, name, shared_bytes)

    def __call__(self, record, num_blocks=1):
        """Run it to the end."""
        table = self.gpu.to_device(np.array(record_words(record, self.gpu.address), np.int64))
        arguments = (self.gpu.address(table), table.size)
        self.gpu.launch(self.function, num_blocks, THREADS, arguments, self.shared_bytes, 0)
        self.gpu.synchronize()


def like_matrices(dtype: str, tensor_cores: bool, accumulator: np.dtype) -> Any:
    packed = as_matrices([np.zeros((1, 8, 8), element_dtype(dtype))], [None], 128, accumulator, np.ascontiguousarray)
    return tma_matrices(packed, np.zeros(NUM_MAPS * MAP_WORDS, np.int64), 128) if tensor_cores else packed


def sums_piece(dtype: str, tensor_cores: bool) -> Piece:
    accumulator = np.dtype(np.float64 if dtype == "float64" else np.float32)
    element = np.empty(0, storage_dtype(element_dtype(dtype)))
    matrices = like_matrices(dtype, tensor_cores, accumulator)
    return Piece(sums, Sums(1, 0, 0, 0, 8, element, matrices, np.empty(0, accumulator)), accumulator)


def product_piece(dtype: str, tensor_cores: bool) -> Piece:
    accumulator = np.dtype(np.float64 if dtype == "float64" else np.float32)
    element = np.empty(0, storage_dtype(element_dtype(dtype)))
    matrices = like_matrices(dtype, tensor_cores, accumulator)
    return Piece(product, Product(1, 0, 0, 0, 0, linear_form(accumulator), element, matrices, element), accumulator)


def copy_piece(dtype: str) -> Piece:
    element = np.empty(0, storage_dtype(element_dtype(dtype)))
    return Piece(copy, Copy(0, 0, 0, element, element), np.dtype(np.float32))


def rows_piece(dtype: str) -> Piece:
    accumulator = np.dtype(np.float64 if dtype == "float64" else np.float32)
    element = np.empty(0, storage_dtype(element_dtype(dtype)))
    return Piece(sum_rows, Rows(1, element, element, np.empty(0)), accumulator)


def words_piece(function: Callable[..., None]) -> Piece:
    return Piece(function, Words(1, np.empty(0, np.int64)), np.dtype(np.float32))


def main() -> None:
    pieces = [sums_piece(dtype, True) for dtype in ("float16", "bfloat16", "float32")]
    pieces += [make(dtype, False) for make in (sums_piece, product_piece) for dtype in ("float64", "float16")]
    pieces += [product_piece("bfloat16", True), copy_piece("float16"), copy_piece("float64")]
    pieces += [rows_piece(dtype) for dtype in ("float64", "bfloat16")]
    pieces += [words_piece(count), words_piece(ping_pong)]
    with TemporaryDirectory() as folder:
        for piece in pieces:
            print(piece.function.__name__, build(piece, "sm_90a", Path(folder) / "piece.cubin")[:40])


if __name__ == "__main__":
    sys.exit(main())
