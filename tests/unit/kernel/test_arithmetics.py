"""The arithmetics of bfloat16 on CPUs against models of the instructions that they are named by, bit for bit.

On a CPU without an instruction this is what stands for it; on one that has it, it is the instruction.
"""

import hashlib
import os
import platform
from pathlib import Path

import numpy as np
import pytest
from cases import assert_same_bits, usable_arithmetics
from children import ROOT, printed
from numba import typeof
from test_micro_kernels import chain, fused_to_odd
from test_tile_gemm import compiled

from flashmoe_numba.backends.cpu import CpuBackend
from flashmoe_numba.device.storage import as_storage
from flashmoe_numba.tile_gemm import IN_ORDER, Rooms, Rows, Scratch, linear_form, nothing_kept, pack_matrices
from flashmoe_numba.tile_gemm.arithmetic import ARITHMETICS, target_features
from flashmoe_numba.tile_gemm.cpu import panel_width
from flashmoe_numba.tile_gemm.micro_kernel import DEPTH_BLOCK, FUSED, MICRO_ROWS
from reference import MoEConfig, element_dtype

BFLOAT16 = element_dtype("bfloat16")
LINEAR = linear_form(np.dtype(np.float32))
INSTRUCTIONS = ("vdpbf16ps", "ldtilecfg", "tdpbf16ps", "tilerelease", "vldmxcsr", "vfmadd231ps")
TEST_FOLDERS = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
TINY = 2.0**-126 - 2.0**-151  # what is below is below 2^-126, the least normal number, also when rounded to 24 bits
pytestmark = pytest.mark.skipif(not FUSED, reason="this CPU has no fused multiply-add")


def fused(a, b, c):
    """a * b + c of float32 arrays, rounded once; denormal numbers are zeros, in what is read and in what is made."""
    with np.errstate(over="ignore", invalid="ignore"):
        a, b, c = (np.where(np.abs(v) < 2.0**-126, np.copysign(np.float32(0), v), v) for v in (a, b, c))
        exact = fused_to_odd(a, b, c)
        return np.where(np.abs(exact) < TINY, np.copysign(0.0, exact), exact).astype(np.float32)


def outer(x, w, k, sums):
    a, b = np.broadcast_arrays(x[:, k, None], w[:, k])
    return fused(a, b, sums)


def pairs(x, w):
    """VDPBF16PS for each two indices."""
    sums = np.zeros((len(x), len(w)), np.float32)
    for k in range(0, x.shape[1], 2):
        sums = outer(x, w, k, outer(x, w, k + 1, sums))
    return sums


def tiles(x, w):
    """TDPBF16PS for each 32 indices."""
    sums = np.zeros((len(x), len(w)), np.float32)
    one = np.ones_like(sums)
    for first in range(0, x.shape[1], 32):
        even, odd = np.zeros_like(sums), np.zeros_like(sums)
        for k in range(first, first + 32, 2):
            even, odd = outer(x, w, k, even), outer(x, w, k + 1, odd)
        sums = fused(fused(even, one, odd), one, sums)
    return sums


MODELS = {"pairs": pairs, "tiles": tiles}
every_arithmetic = pytest.mark.parametrize("arithmetic", [name for name in MODELS if name in usable_arithmetics()])


def expected_sums(arithmetic, x, w):
    """Float32 sums of rows `[rows, depth]` and weights `[columns, depth]`, padded with zeros to whole steps."""
    if arithmetic == "fma":
        return chain(x, w)
    padding = [(0, 0), (0, -x.shape[1] % 32)]
    return MODELS[arithmetic](*(np.pad(v.astype(np.float32), padding) for v in (x, w)))


def sums_of(arithmetic, x, w, tile_n=128):
    """The same by the tile GEMM, which stores the sums of a router so: float32, no activation, a bias of zero."""
    backend = CpuBackend(arithmetic)
    (rows, depth), columns = x.shape, len(w)
    sizes = dict(num_ranks=1, num_tokens=rows, num_experts=1, num_topk=1, hidden=depth, ffn=columns)
    config = MoEConfig(**sizes, dtype="bfloat16", tile_m=256, tile_n=tile_n)
    matrices = backend.pack([w[None]], [None], tile_n, np.dtype(np.float32), None)
    sums, words = np.full(rows * columns, np.nan, np.float32), np.zeros(1, np.int64)
    scratch = backend.make_scratch(config)
    for array in scratch:
        array[:] = np.nan
    for n in range(-(-columns // tile_n)):
        rooms, rows_in = Rooms(sums, 0, words, IN_ORDER, words, 0), Rows(as_storage(x), 0, words, IN_ORDER)
        compiled(rooms, nothing_kept(rooms), rows_in, rows, matrices, 0, n, LINEAR, scratch)
    backend.close()
    return sums.reshape(rows, columns)


def assert_same_sums(got, expected, what):
    """Bit for bit, but any NaN is a NaN; a bias of 0 makes -0 to 0."""
    got, expected = (np.where(np.isnan(sums), np.float32(np.nan), sums + np.float32(0)) for sums in (got, expected))
    assert_same_bits(got, expected, what)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(BFLOAT16)


def from_all_bits(rng, *shape):
    """Any numbers but NaN and infinities: sums overflow, vanish, and are denormal."""
    x = rng.integers(0, 1 << 16, shape, dtype=np.uint16).view(BFLOAT16)
    return np.where(np.isfinite(x.astype(np.float32)), x, BFLOAT16.type(0))


def near_the_least(rng, *shape):
    """Numbers whose products are about as large as the least normal number."""
    return (rng.standard_normal(shape) * 2.0 ** rng.integers(-68, -60, shape)).astype(BFLOAT16)


@every_arithmetic
def test_every_height(arithmetic):
    """Of odd columns, more than a panel, in two column tiles; and of odd depth, more than a block."""
    rng = np.random.default_rng(1)
    rows = max(40, 2 * MICRO_ROWS + 1)
    x, w = normal(rng, rows, 2 * DEPTH_BLOCK + 35), normal(rng, 67, 2 * DEPTH_BLOCK + 35)
    expected = expected_sums(arithmetic, x, w)
    for height in range(1, rows + 1):
        got = sums_of(arithmetic, x[:height].copy(), w, tile_n=35)
        assert_same_sums(got, expected[:height], f"{arithmetic}, {height} rows")


def denormal_or_large(rng, *shape):
    """Numbers whose products are of ordinary size, and of two indices one is of a denormal number."""
    x = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    return (x & 0x807F | np.where(rng.integers(0, 2, shape) == 1, 0x7000, 0).astype(np.uint16)).view(BFLOAT16)


@pytest.mark.parametrize("numbers", [normal, from_all_bits, near_the_least, denormal_or_large])
@every_arithmetic
def test_every_kind_of_number(arithmetic, numbers):
    rng = np.random.default_rng(2)
    for depth in (1, 2, 31, 32, 33, 64, 95, 2 * DEPTH_BLOCK, 4 * DEPTH_BLOCK + 1):
        x, w = numbers(rng, 7, depth), numbers(rng, 19, depth)
        got, expected = sums_of(arithmetic, x, w), expected_sums(arithmetic, x, w)
        assert_same_sums(got, expected, f"{arithmetic}, {numbers.__name__}, depth {depth}")


def test_numbers_show_what_they_are_for():
    """The arithmetics differ, and so does one that keeps denormal numbers: else the tests above prove little."""
    rng = np.random.default_rng(3)
    x, w = normal(rng, 7, 64), normal(rng, 19, 64)
    fma, paired, tiled = (expected_sums(name, x, w) for name in ("fma", "pairs", "tiles"))
    assert (fma != paired).any() and (fma != tiled).any() and (paired != tiled).any()
    x, w = near_the_least(rng, 7, 2), near_the_least(rng, 19, 2)
    assert (chain(x[:, ::-1], w[:, ::-1]) != expected_sums("pairs", x, w)).mean() > 0.2


@every_arithmetic
def test_denormals_are_decided_after_rounding(arithmetic):
    """2^-126 less a little: rounded to 24 bits it is below the least normal number, or it is that number.

    Made as `pairs` and `tiles` come to it: odd products are added before even ones.
    """
    for little, expected in ((1.5 * 2.0**-151, 0.0), (2.0**-151, 2.0**-126), (2.0**-152, 2.0**-126)):
        x = np.array([[little * 2.0**75, 2.0**-63]]).astype(BFLOAT16)
        w = np.array([[-(2.0**-75), 2.0**-63]]).astype(BFLOAT16)
        got = sums_of(arithmetic, x, w)
        assert got[0, 0] == expected_sums(arithmetic, x, w)[0, 0], little
        if arithmetic == "pairs":
            assert got[0, 0] == expected, little


@every_arithmetic
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(arithmetic, value):
    rng = np.random.default_rng(4)
    for depth, at in ((33, 32), (33, 5), (1, 0), (2 * DEPTH_BLOCK + 1, 2 * DEPTH_BLOCK)):
        x, w = normal(rng, 17, depth), normal(rng, 35, depth)
        clean = sums_of(arithmetic, x, w)
        x[3, at], w[34, at] = value, value
        got = sums_of(arithmetic, x, w)
        assert_same_sums(got, expected_sums(arithmetic, x, w), f"{value} at {at} of {depth}")
        others = np.ix_(np.arange(17) != 3, np.arange(35) != 34)
        assert_same_bits(got[others].copy(), clean[others].copy(), "the other rows and columns")
        assert not np.isfinite(got[3]).any() and not np.isfinite(got[:, 34]).any()


def print_digests():
    """Of sums of several heights, for another process."""
    rng = np.random.default_rng(5)
    x, w = normal(rng, 37, 75), normal(rng, 70, 75)
    for arithmetic in usable_arithmetics():
        digest = hashlib.sha256()
        for height in (1, 5, 6, 7, 12, 13, 16, 17, 32, 37):
            digest.update(sums_of(arithmetic, x[:height].copy(), w).tobytes())
        print(arithmetic, digest.hexdigest())


@pytest.mark.skipif("+fma" not in target_features(), reason="features of x86-64")
def test_the_bits_are_those_of_lesser_cpus(capsys):
    """Of one with short vectors and no instruction of the kind: on a CPU that has one, this is where they meet."""
    print_digests()
    here = capsys.readouterr().out
    assert "pairs" in here
    lesser = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+fma", "PYTHONPATH": TEST_FOLDERS}
    there = printed("-c", "import test_arithmetics as t; t.print_digests()", **lesser)
    assert there.startswith(here)  # where the system refuses AMX, here has no `tiles`


def print_instructions():
    """Mnemonics in the code of a product of each arithmetic, for another process."""
    for arithmetic in MODELS:
        form = ARITHMETICS[arithmetic].form
        matrices = pack_matrices([np.zeros((1, 3, 5), BFLOAT16)], [None], 2, panel_width(np.float32), np.float32, form)
        elements, words, sums = np.zeros(1, np.int16), np.zeros(1, np.int64), np.zeros(1, np.float32)
        rows, rooms = Rows(elements, 0, words, IN_ORDER), Rooms(elements, 0, words, IN_ORDER, words, 0)
        arguments = rooms, nothing_kept(rooms), rows, 1, matrices, 0, 0, LINEAR, Scratch(sums, sums)
        signature = tuple(map(typeof, arguments))
        compiled.compile(signature)
        code = compiled.inspect_asm(signature)
        print(arithmetic, *sorted({word for word in INSTRUCTIONS if f"{word}\t" in code or f"{word}\n" in code}))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
def test_cpus_that_have_the_instruction_are_given_it():
    """Compiled for one, whatever runs here; the machine code is looked at, not run."""
    features = ",".join(
        ["+avx", "+avx2", "+fma", "+f16c", *ARITHMETICS["pairs"].features, *ARITHMETICS["tiles"].features]
    )
    server = {"NUMBA_CPU_NAME": "sapphirerapids", "NUMBA_CPU_FEATURES": features, "PYTHONPATH": TEST_FOLDERS}
    said = printed("-c", "import test_arithmetics as t; t.print_instructions()", **server)
    assert said.splitlines() == ["pairs vdpbf16ps", "tiles ldtilecfg tdpbf16ps tilerelease"]
