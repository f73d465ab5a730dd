"""The tile GEMM against float64 NumPy, and its promise: a row's bits depend on the row and the weights only."""

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, finfo, usable_arithmetics
from children import printed
from exact_activations import assert_within
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numba import njit

from flashmoe_numba.backends.cpu import CpuBackend
from flashmoe_numba.backends.fibers import FiberBackend
from flashmoe_numba.device.cpu import JIT_OPTIONS
from flashmoe_numba.device.fibers import Scheduler
from flashmoe_numba.device.storage import as_storage
from flashmoe_numba.tile_gemm import (
    IN_ORDER,
    KEPT,
    LOCAL,
    RANK,
    ROW_IN,
    ROW_OUT,
    Rooms,
    Rows,
    Scratch,
    as_matrices,
    make_form,
    tile_gemm,
    word_of,
)
from flashmoe_numba.tile_gemm.activations import VERBS
from flashmoe_numba.tile_gemm.arithmetic import PAIRED_DTYPE
from flashmoe_numba.tile_gemm.cpu_activations import exp32
from flashmoe_numba.tile_gemm.matrices import STAGE_ELEMENTS, SUMS_ELEMENTS
from flashmoe_numba.tile_gemm.panels import pack, packed_elements, panels_per_tile
from reference import ACTIVATIONS, ExpertKind, MoEConfig, activation, element_dtype
from reference.activations import FILES, MOST_ULPS
from reference.experts import activate
from reference.formats import FORMATS
from reference.tolerance import ELEMENTWISE_ULPS, GROWTH


def multiply(out, kept, a, rows, matrices, expert, n, form, scratch):
    tile_gemm(out, kept, a, rows, matrices, expert, n, form, scratch)


def on_fibers(lanes):
    def run(*arguments):
        scheduler = Scheduler(seed=lanes)
        scheduler.add_block("test", multiply, arguments, lanes)
        scheduler.run()

    return run


compiled = njit(**JIT_OPTIONS)(multiply)


class LanesBackend:
    """What a target of many lanes per block gives the layer, on NumPy arrays."""

    def pack(self, matrices, biases, tile_n, accumulator, rows):
        return as_matrices(matrices, biases, tile_n, accumulator, np.ascontiguousarray)

    def make_scratch(self, config):
        return Scratch(*(np.empty(size, config.accumulator) for size in (STAGE_ELEMENTS, SUMS_ELEMENTS)))

    def close(self):
        pass


@dataclass
class Product:
    """One product `act(x @ w[0].T + b[0]) * (x @ w[1].T + b[1])`, the second factor for gated ones only."""

    dtype: str
    x: np.ndarray  # [rows, depth]
    w: list[np.ndarray]  # [columns, depth] each
    b: list[np.ndarray]  # [columns] each, in the accumulator's type
    activation: str
    arithmetic: str = "fma"  # of CPUs
    form: dict = field(default_factory=dict)  # what else the kind of expert is

    @property
    def kind(self):
        return ExpertKind(activation=self.activation, gated=len(self.w) == 2, **self.form)

    @property
    def config(self):
        rows, depth = self.x.shape
        sizes = dict(hidden=depth, ffn=len(self.w[0]), num_experts=1, num_topk=1, num_ranks=1, num_tokens=rows)
        return MoEConfig(**sizes, dtype=self.dtype, gated=len(self.w) == 2)

    def run(
        self,
        tile_n=128,
        tile_m=1000,
        targets=("cpu", 1),
        scratch=None,
        place=lambda array: array,
        scatter=None,
        kept=None,
    ):
        """`[rows, columns]`, made of tiles as the kernel makes it, by the second of two experts, in a larger array.

        Args:
            scratch: of a block; by default, more than enough.
            place: gives a copy of an array in memory of its choice; the tile GEMM gets nothing else.
            scatter: a seed; rows lie in any order, and results go to any rows of two rooms.
            kept: an array `[rows, parts * columns]` to fill, or None.
        """
        kind, lanes = targets
        c = self.config
        rows, columns = len(self.x), len(self.w[0])
        backends = {"cpu": partial(CpuBackend, self.arithmetic), "fibers": FiberBackend, "lanes": LanesBackend}
        backend, function = backends[kind](), compiled if kind == "cpu" else on_fibers(lanes)
        other = [np.full_like(w, np.nan) for w in self.w]
        experts = [np.stack(pair) for pair in zip(other, self.w, strict=True)]
        biases = [np.stack([np.full_like(b, np.nan), b]) for b in self.b]
        matrices = backend.pack(experts, biases, tile_n, c.accumulator, None)
        arrays = {name: value for name, value in matrices._asdict().items() if isinstance(value, np.ndarray)}
        matrices = matrices._replace(**{name: place(array) for name, array in arrays.items()})
        rooms = [place(as_storage(np.full((rows + 2, columns), 77, self.x.dtype))) for _ in range(2)]
        places = self.places(scatter)
        order = np.arange(rows) if scatter is None else places[:, ROW_IN]
        x = place(as_storage(self.x[np.argsort(order)]))
        addresses = place(np.array([room.ctypes.data for room in rooms]))
        words = place(places.reshape(-1))
        tile_n = tile_n * len(self.w)
        enough = MoEConfig(**{**vars(c), "tile_m": 256, "tile_m_min": 256, "tile_n": tile_n})
        scratch = Scratch(*map(place, scratch or backend.make_scratch(enough)))
        for array in scratch:
            array[:] = np.nan
        form = make_form(self.kind, c.accumulator)
        keeps = place(as_storage(np.full((0 if kept is None else rows, columns * len(self.w)), 77, self.x.dtype)))
        for first in range(0, rows, tile_m):
            word_in, word_out, word_kept = (
                IN_ORDER if scatter is None else word_of(first, word) for word in (ROW_IN, ROW_OUT, KEPT)
            )
            for n in range(-(-columns // matrices.tile_n)):
                function(
                    Rooms(rooms[0], first + 1, words, word_out, addresses, 0),
                    Rooms(keeps, first, words, word_kept, addresses, LOCAL), Rows(x, first, words, word_in),
                    min(tile_m, rows - first), matrices, 1, n, form, scratch,
                )  # fmt: skip
        if kept is not None:
            kept[:] = keeps.view(self.x.dtype).reshape(kept.shape)[places[:, KEPT]]
        backend.close()
        rooms = np.stack([room.view(self.x.dtype).reshape(rows + 2, columns) for room in rooms])
        got = rooms[places[:, RANK], places[:, ROW_OUT]].copy()
        rooms[places[:, RANK], places[:, ROW_OUT]] = 77
        assert (rooms == 77).all(), f"{self}: written outside of the tile, with tile_n {tile_n}"
        return got

    def places(self, seed):
        """int64 `[rows, PLACE_WORDS]`: of rows that are scattered, or of those that are in order."""
        rows = len(self.x)
        if seed is None:
            return np.stack([np.arange(rows), np.arange(rows) + 1, np.zeros(rows, int), np.arange(rows)], axis=1)
        rng, ranks = np.random.default_rng(seed), np.random.default_rng(seed).integers(0, 2, rows)
        return np.stack([rng.permutation(rows), rng.permutation(rows) + 1, ranks, rng.permutation(rows)], axis=1)

    def check(self, got):
        """Against float64: a chain of `depth` roundings, the elementwise steps, one rounding to the element type."""
        x = self.x.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            sums = [x @ w.astype(np.float64).T + b for w, b in zip(self.w, self.b, strict=True)]
            sizes = [
                np.abs(x) @ np.abs(w.astype(np.float64)).T + np.abs(b) for w, b in zip(self.w, self.b, strict=True)
            ]
            expected = activate(sums, self.kind)
            sizes[-1] += abs(self.kind.up_offset)
            # An activation magnifies an error by less than 1.2, relu2 by twice its argument, a bound by no more; each
            # factor has its own.
            steps = np.sqrt(x.shape[1] + ELEMENTWISE_ULPS**2)
            if self.activation == "relu2":
                sizes[0] = 2 * sizes[0] ** 2
            error = 1.2 * len(sums) * GROWTH * self.config.format.sums.unit_roundoff * steps
            bound = error * np.prod(sizes, axis=0) + FORMATS[self.dtype].unit_roundoff * np.abs(expected)
        bound += float(finfo(self.x.dtype).smallest_subnormal) + 1.2e-38  # results that are not normal
        wrong = ~(np.abs(got.astype(np.float64) - expected) <= bound)
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0])
            rows, depth = self.x.shape
            raise AssertionError(
                f"{self.dtype} [{rows}, {depth}] x [{depth}, {len(self.w[0])}] x {len(self.w)}, {self.activation}: "
                f"{wrong.sum()} wrong, first {at}: {got[at]!r}, expected {expected[at]!r} +- {bound[at]:.1e}"
            )


def make_product(dtype, rows, depth, columns, gated, name, seed=0, arithmetic="fma"):
    rng = np.random.default_rng(seed)
    config = MoEConfig(num_ranks=1, num_tokens=1, hidden=1, ffn=1, num_experts=1, num_topk=1, dtype=dtype)

    def normal(*shape):
        return rng.standard_normal(shape).astype(config.numpy_dtype)

    parts = 2 if gated else 1
    w = [(normal(columns, depth).astype(np.float64) / depth**0.5).astype(config.numpy_dtype) for _ in range(parts)]
    b = [rng.standard_normal(columns).astype(config.accumulator) for _ in range(parts)]
    return Product(dtype, normal(rows, depth), w, b, name, arithmetic)


@st.composite
def products(draw, max_rows=200, depths=(1, 5, 255, 256, 257, 600), max_columns=150):
    dtype = draw(st.sampled_from(DTYPES))
    return make_product(
        dtype,
        draw(st.integers(1, max_rows)),
        draw(st.sampled_from(depths)),
        draw(st.integers(1, max_columns)),
        draw(st.booleans()),
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.integers(0, 2**32)),
        draw(st.sampled_from(usable_arithmetics())) if dtype == PAIRED_DTYPE else "fma",
    )


@given(products(), st.sampled_from([1, 7, 16, 33, 64, 128]))
@example(make_product("float32", 12, 256, 32, True, "silu"), 128)
@example(make_product("float32", 1, 1, 1, False, "identity"), 128)
def test_cpu_tiles_equal_float64(product, tile_n):
    product.check(product.run(tile_n))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_variant(dtype, gated, name):
    product = make_product(dtype, 23, 300, 37, gated, name)
    product.check(product.run(tile_n=16))


@settings(max_examples=settings().max_examples // 2)
@given(products(max_rows=7, depths=(1, 3, 17), max_columns=9), st.integers(1, 4), st.integers(1, 3))
def test_interpreted_tiles_equal_float64(product, tile_n, lanes):
    product.check(product.run(tile_n, tile_m=3, targets=("fibers", lanes)))


FORMS = {
    "clamp": dict(bound="clamp", gate_limit=0.9, up_limit=0.7, slope=1.702, up_offset=1.0),  # as of gpt_oss
    "clamp the gate": dict(bound="clamp", gate_limit=0.6),
    "clamp up": dict(bound="clamp", up_limit=0.6),
    "clamp activated": dict(bound="clamp_activated", gate_limit=0.4, up_limit=0.7),
    "softcap": dict(bound="softcap", gate_limit=0.8, up_limit=1.1, slope=1.3),
    "slope": dict(slope=0.4),
    "offset": dict(up_offset=-0.3),
}


def form_cases():
    """Each form, for silu and for another activation where it may have one."""
    return [(form, name) for form in FORMS for name in ("silu", "gelu") if name == "silu" or form != "softcap"]


@pytest.mark.parametrize(("form", "name"), form_cases())
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms_of_gated_experts_equal_float64(dtype, form, name):
    product = make_product(dtype, 23, 130, 37, True, name)
    plain, product = product, replace(product, form=FORMS[form])
    for targets in (("cpu", 1), ("fibers", 2), ("lanes", 128)):
        y = product.run(16, targets=targets)
        product.check(y)
        assert (y != plain.run(16, targets=targets)).any(), f"{form} does nothing on {targets}"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("targets", [("cpu", 1), ("lanes", 128)])
def test_forms_of_what_is_not_finite_are_those_of_the_reference(targets, form, value):
    """In g or in u; a limit takes an infinity, and no NaN."""
    product = replace(make_product("float32", 1, 1, 2, True, "silu"), form=FORMS[form])
    product.x[:], product.b = 1, [np.zeros(2, np.float32)] * 2
    product.w = [np.array([[value], [2]], np.float32), np.array([[2], [value]], np.float32)]
    with np.errstate(invalid="ignore", over="ignore"):
        expected = activate([w[:, 0].astype(np.float64) for w in product.w], product.kind)
    np.testing.assert_allclose(product.run(16, targets=targets)[0], expected, rtol=1e-6)


@pytest.mark.parametrize("lanes", [64, 128])
@pytest.mark.parametrize(
    ("dtype", "rows", "depth", "columns", "gated", "name", "tile_n"),
    [
        ("float32", 9, 33, 16, False, "identity", 64),  # as many columns as lanes side by side
        ("float32", 9, 33, 17, False, "identity", 64),
        ("float32", 33, 65, 129, True, "silu", 64),
        ("float64", 3, 33, 70, False, "gelu", 7),
        ("float16", 40, 31, 9, True, "relu", 5),
        ("bfloat16", 1, 1, 130, False, "identity", 128),
    ],
)
def test_tiles_of_many_lanes_equal_float64(dtype, rows, depth, columns, gated, name, tile_n, lanes):
    product = make_product(dtype, rows, depth, columns, gated, name)
    y = product.run(tile_n, targets=("lanes", lanes))
    product.check(y)
    last = Product(dtype, product.x[-1:].copy(), product.w, product.b, name)
    assert_same_bits(last.run(tile_n, targets=("lanes", 128)), y[-1:], "the last row alone")


@given(products(), st.integers(0, 2**32))
def test_a_rows_bits_do_not_depend_on_its_tile(product, seed):
    rng = np.random.default_rng(seed)
    y, rows = product.run(), len(product.x)
    for row in {0, rows - 1, int(rng.integers(rows))}:
        alone = replace(product, x=product.x[row : row + 1].copy())
        assert_same_bits(alone.run(), y[row : row + 1], f"row {row} of {rows} alone, depth {product.x.shape[1]}")
    order = rng.permutation(rows)
    shuffled = replace(product, x=product.x[order])
    assert_same_bits(shuffled.run(), y[order], f"{rows} rows in another order")
    for tile_m, tile_n in ((1, 128), (5, 3), (13, 16), (64, 50)):
        if rows * len(product.w[0]) < 4000 or tile_m > 5:
            assert_same_bits(product.run(tile_n, tile_m), y, f"{rows} rows in tiles of {tile_m} by {tile_n}")


@pytest.mark.parametrize("targets", [("cpu", 1), ("fibers", 2), ("lanes", 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_rows_lie_and_go_does_not_matter(dtype, targets):
    for rows, tile_m in ((1, 1), (13, 5), (40, 40)):
        product = make_product(dtype, rows, 37, 21, True, "silu")
        y = product.run(16, tile_m, targets)
        assert_same_bits(product.run(16, tile_m, targets, scatter=rows), y, f"{rows} scattered rows, {targets}")


@pytest.mark.parametrize("targets", [("cpu", 1), ("fibers", 2), ("lanes", 128)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_kept_are_the_products_of_each_part(gated, dtype, targets):
    """Bit for bit those of the part alone, without an activation; results are those of a tile that keeps nothing."""
    for arithmetic in usable_arithmetics() if dtype == PAIRED_DTYPE and targets[0] == "cpu" else ["fma"]:
        for rows, tile_m, scatter in ((1, 1, None), (13, 5, None), (29, 29, 7)):
            product = make_product(dtype, rows, 37, 21, gated, "silu", arithmetic=arithmetic)
            kept = np.empty((rows, 21 * len(product.w)), product.x.dtype)
            y = product.run(16, tile_m, targets, scatter=scatter, kept=kept)
            assert_same_bits(product.run(16, tile_m, targets, scatter=scatter), y, "with nothing kept")
            for part, (w, b) in enumerate(zip(product.w, product.b, strict=True)):
                alone = Product(dtype, product.x, [w], [b], "identity", arithmetic)
                got = kept[:, 21 * part : 21 * (part + 1)].copy()
                assert_same_bits(got, alone.run(16, tile_m, targets), f"part {part} of {rows} rows, {arithmetic}")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_row_stays_in_its_row(dtype, gated, name, value):
    product = make_product(dtype, 29, 300, 21, gated, name)
    y = product.run()
    for row in (0, 11, 12, 28):
        x = product.x.copy()
        x[row, 270] = value
        bad = Product(dtype, x, product.w, product.b, product.activation).run()
        others = np.arange(29) != row
        assert_same_bits(bad[others], y[others], f"{value} in row {row}")
        if np.isnan(value):  # an activation may take -inf to 0, but hides no NaN
            assert np.isnan(bad[row].astype(np.float64)).all(), f"{name}, {value} in row {row}: {bad[row]}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_integers_are_multiplied_exactly(dtype):
    """Small integers round nowhere, so the result is equal to integer arithmetic: no tolerance to hide in."""
    rng = np.random.default_rng(3)
    for rows, depth, columns, tile_n in ((13, 61, 35, 16), (1, 5, 1, 4), (200, 30, 33, 128)):
        product = make_product(dtype, rows, depth, columns, False, "relu")
        x, w, b = (rng.integers(-1, 2, shape) for shape in ((rows, depth), (columns, depth), columns))
        exact = Product(
            dtype, x.astype(product.x.dtype), [w.astype(product.x.dtype)], [b.astype(product.b[0].dtype)], "relu"
        )
        expected = np.maximum(x @ w.T + b, 0)
        np.testing.assert_array_equal(exact.run(tile_n).astype(np.int64), expected)


def activation_inputs(dtype):
    """All numbers of 16 bits; of longer ones some of every exponent, more where something is decided, and the ends."""
    element = element_dtype(dtype)
    if element.itemsize == 2:
        return np.arange(65536, dtype=np.uint16).view(element)
    word = np.dtype(f"i{element.itemsize}")
    sign = np.array(-0.0, element).view(word)
    mantissa = finfo(element).nmant
    rng = np.random.default_rng(0)
    exponents = np.repeat(np.arange(2 ** (8 * element.itemsize - 1 - mantissa)), 4).astype(word) << mantissa
    bits = exponents | rng.integers(0, 2**mantissa, exponents.size, dtype=word)
    far = {"float32": 110, "float64": 760}[dtype]
    dense = np.concatenate([-rng.uniform(0, far, 500), rng.uniform(-40, 14, 1000), rng.uniform(-6, 6, 500)])
    edges = [0.0, np.inf, finfo(element).max, -87, -88.1, -90, -174, -176, -13.15, -14, -37.6, -38.6, -39, -709, -1418]
    edges = np.array(edges, element)
    with np.errstate(over="ignore"):
        ends = np.concatenate([edges, np.nextafter(edges, -edges), np.nextafter(edges, 2 * edges)])
    return np.concatenate([bits.view(element), (bits | sign).view(element), dense.astype(element), ends, -ends])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_are_accurate_everywhere(dtype, name):
    """One product of 1 and every input, so that all go through the tile's loops, body and tail."""
    x, accumulator = activation_inputs(dtype), np.float64 if dtype == "float64" else np.float32
    product = Product(dtype, np.ones((1, 1), x.dtype), [x[:, None]], [np.zeros(x.size, accumulator)], name)
    got = product.run(tile_n=1001)[0]
    most_ulps = MOST_ULPS if x.dtype.itemsize > 2 else 0.501
    assert_within(name, x, got, most_ulps)
    some = slice(0, x.size, 7)
    few = Product(dtype, product.x, [x[some, None]], [np.zeros(x[some].size, accumulator)], name)
    assert_same_bits(few.run(tile_n=3)[0], got[some], "in tiles of three columns")


@pytest.mark.parametrize("real", [np.float32, np.float64])
def test_formulas_are_accurate_with_the_exp_of_a_library(real):
    """As GPUs compile them; the interpreted verbs are those of the reference."""
    x = activation_inputs(np.dtype(real).name)[::5]
    for name, verb in VERBS.items():
        formula = FILES[name].make(real, lambda function: function, lambda v: real(np.exp(v)))
        with np.errstate(all="ignore"):
            assert_within(name, x, np.array([formula(v) for v in x], real), MOST_ULPS)
        assert_within(name, x, np.array([verb(v) for v in x]), 8)
        assert_within(name, x, activation(name, x), 8)
        zeros = np.array([0.0, -0.0], real)
        for function in (formula, verb):
            kept = np.abs(zeros) if name == "relu2" else zeros  # a square has no sign
            assert_same_bits(np.array([function(v) for v in zeros], real), kept, f"{name} keeps the sign of zero")


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 50), st.sampled_from([1, 4, 16, 32]), st.integers(1, 2))
def test_packing_moves_every_weight_once(columns, depth, tile_n, width, parts):
    """Each weight is where the docstring says, and everything else is zero."""
    tile_n = min(tile_n, columns)
    matrices = [1.0 + part * 1000 + np.arange(columns * depth).reshape(columns, depth) for part in range(parts)]
    out = np.full(packed_elements(columns, depth, tile_n, width, parts), np.nan)
    pack(matrices, tile_n, width, out)
    panels = panels_per_tile(columns, tile_n, width)
    expected = np.zeros(out.size)
    for part, matrix in enumerate(matrices):
        for (column, k), value in np.ndenumerate(matrix):
            tile, inside = divmod(column, tile_n)
            panel, lane = divmod(inside, width)
            expected[(((tile * parts + part) * panels + panel) * depth + k) * width + lane] = value
    np.testing.assert_array_equal(out, expected)


@njit(**JIT_OPTIONS)
def exp_all(x, y):
    for i in range(x.size):
        y[i] = exp32(x[i])


def test_exp_is_accurate_to_two_units_in_the_last_place():
    rng = np.random.default_rng(0)
    tiny = rng.integers(0, 2**31, 1_000_000, dtype=np.uint32).view(np.float32)  # all magnitudes alike
    tiny = tiny[tiny < 87]
    x = np.concatenate([np.linspace(-87, 88, 1_000_001, dtype=np.float32), tiny, -tiny])
    y = np.empty_like(x)
    exp_all(x, y)
    expected = np.exp(x.astype(np.float64))
    ulps = np.abs(y - expected) / np.spacing(expected.astype(np.float32)).astype(np.float64)
    worst = int(ulps.argmax())
    assert ulps[worst] <= 2, f"exp({x[worst]!r}) = {y[worst]!r}, expected {expected[worst]!r}: {ulps[worst]:.2f} ulps"
    assert y[x == 0].tolist() == [1.0] * int((x == 0).sum())


def test_exp_beyond_its_range():
    x = np.array([-np.inf, -1e30, -88, 89, 1e30, np.inf, np.nan], np.float32)
    y = np.empty_like(x)
    exp_all(x, y)
    assert (y[:3] == 0).all() and (y[3:6] > 1e38).all() and np.isfinite(y[:6]).all(), f"{y}"
    assert np.isnan(y[6])


def test_vectors_are_those_that_numba_compiles_for():
    """So that a machine with AVX-512 can run the code of one without."""
    haswell = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    program = "from flashmoe_numba.tile_gemm import micro_kernel as k; print(k.VECTOR_BYTES, k.MICRO_ROWS, k.FUSED)"
    assert printed("-c", program, **haswell).split() == ["32", "6", "True"]
