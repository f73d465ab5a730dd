"""Gradients of hidden rows against float64, and their promise: a row's bits depend on the row and the weights only."""

from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pytest
from cases import DTYPES, assert_same_bits, finfo, usable_arithmetics
from numba import njit
from test_guard_pages import at_the_end, at_the_start, in_a_child
from test_tile_gemm import FORMS, LanesBackend, form_cases

from flashmoe_numba.backends.cpu import CpuBackend
from flashmoe_numba.backends.fibers import FiberBackend
from flashmoe_numba.device.cpu import JIT_OPTIONS
from flashmoe_numba.device.fibers import Scheduler
from flashmoe_numba.device.storage import as_storage
from flashmoe_numba.tile_gemm import IN_ORDER, KEPT, PLACE_WORDS, ROW_IN, Rows, hidden_gradient, make_form, word_of
from flashmoe_numba.tile_gemm.arithmetic import PAIRED_DTYPE
from reference import ACTIVATIONS, ExpertKind, MoEConfig
from reference.activations import MOST_SLOPE_ROUNDINGS
from reference.expert_gradients import slopes
from reference.experts import activate
from reference.formats import FORMATS
from reference.tolerance import GROWTH

TARGETS = [("cpu", 1), ("fibers", 2), ("lanes", 128)]
SENTINEL = 77


def derive(kept, out, active, dots, factors, parts, a, rows, matrices, expert, n, form, scratch):
    hidden_gradient(kept, out, active, dots, factors, parts, a, rows, matrices, expert, n, form, scratch)


compiled = njit(**JIT_OPTIONS)(derive)


def on_fibers(lanes, *arguments):
    scheduler = Scheduler(seed=lanes)
    scheduler.add_block("test", derive, arguments, lanes)
    scheduler.run()


@dataclass
class Derivative:
    """Gradients of some rows' results, and what their up projections were."""

    dtype: str
    a: np.ndarray  # [rows, depth]
    w: np.ndarray  # [columns, depth]: the down projection, transposed
    products: np.ndarray  # [rows, parts, columns]
    factors: np.ndarray  # [rows], in the accumulator's type
    kind: ExpertKind
    arithmetic: str = field(default="fma")

    @property
    def accumulator(self):
        return self.factors.dtype

    def rows(self, chosen):
        """The same of some rows."""
        return replace(
            self, a=self.a[chosen].copy(), products=self.products[chosen].copy(), factors=self.factors[chosen].copy()
        )

    def run(self, tile_n=16, tile_m=1000, targets=("cpu", 1), scatter=None, place=lambda array: array):
        """(out `[rows, parts, columns]`, active `[rows, columns]`, dots `[rows, tiles]`), by the second of two experts.

        Args:
            scatter: a seed; rows to multiply lie in any order, and so do kept rows.
            place: gives a copy of an array in memory of its choice.
        """
        target, lanes = targets
        (rows, depth), (_, parts, columns) = self.a.shape, self.products.shape
        sizes = dict(num_ranks=1, num_tokens=max(rows, 1), hidden=depth, ffn=columns, num_experts=1, num_topk=1)
        sizes |= dict(tile_m=256, tile_m_min=256, tile_n=tile_n * parts)
        config = MoEConfig(**sizes, dtype=self.dtype, gated=parts == 2)
        backends = {"cpu": partial(CpuBackend, self.arithmetic), "fibers": FiberBackend, "lanes": LanesBackend}
        backend, function = backends[target](), compiled if target == "cpu" else partial(on_fibers, lanes)
        weights = [np.stack([np.full_like(self.w, np.nan), self.w])]
        matrices = backend.pack(weights, [None], tile_n, self.accumulator, None)
        arrays = {name: value for name, value in matrices._asdict().items() if isinstance(value, np.ndarray)}
        matrices = matrices._replace(**{name: place(array) for name, array in arrays.items()})
        scratch = backend.make_scratch(config)
        scratch = scratch._replace(rows=place(scratch.rows), sums=place(scratch.sums))
        for array in scratch:
            array[:] = np.nan
        places = np.zeros((rows, PLACE_WORDS), np.int64)
        places[:, ROW_IN], places[:, KEPT] = np.arange(rows), np.arange(rows) + 1
        if scatter is not None:
            rng = np.random.default_rng(scatter)
            places[:, ROW_IN], places[:, KEPT] = rng.permutation(rows), rng.permutation(rows) + 1
        words, mine = place(places.reshape(-1)), places[:, KEPT]
        a = place(as_storage(self.a[np.argsort(places[:, ROW_IN])]))
        kept, factors = np.full((rows + 2, parts, columns), np.nan, self.a.dtype), np.full(rows, np.nan)
        kept[mine], factors[places[:, ROW_IN]] = self.products, self.factors
        kept, factors = place(as_storage(kept)), place(factors.astype(self.accumulator))
        tiles = -(-columns // tile_n)
        out = place(as_storage(np.full((rows + 2, parts, columns), SENTINEL, self.a.dtype)))
        active = place(as_storage(np.full((rows + 2, columns), SENTINEL, self.a.dtype)))
        dots = place(np.full((rows + 2) * tiles, SENTINEL, self.accumulator))
        form = make_form(self.kind, self.accumulator)
        for first in range(0, max(rows, 1), tile_m):
            word_in, word_kept = (IN_ORDER if scatter is None else word_of(first, word) for word in (ROW_IN, KEPT))
            for n in range(tiles):
                function(
                    Rows(kept, first + 1, words, word_kept), out, active, dots, factors, parts,
                    Rows(a, first, words, word_in), min(tile_m, rows - first), matrices, 1, n, form, scratch,
                )  # fmt: skip
        backend.close()
        results = [out.view(self.a.dtype).reshape(rows + 2, parts, columns)]
        results += [active.view(self.a.dtype).reshape(rows + 2, columns), dots.reshape(rows + 2, tiles)]
        got = [array[mine].copy() for array in results]
        for array in results:
            array[mine] = SENTINEL
            assert (array == SENTINEL).all(), "written beside the rows"
        return got

    def check(self, got, tile_n):
        """Against float64, with the roundings u of sums that each value goes through.

        dA is a chain; A and its derivatives are off by a few dozen u of what they are made of: of the activation's
        slope MOST_SLOPE_ROUNDINGS, where |s| + |x s'| is at most 2 (of relu2 twice its argument), of other steps one
        each, of an exponential's argument as many as it is long.
        """
        u, element = FORMATS[self.accumulator.name].unit_roundoff, FORMATS[self.dtype].unit_roundoff
        a, w = self.a.astype(np.float64), self.w.astype(np.float64)
        products = [part.astype(np.float64) for part in self.products.transpose(1, 0, 2)]
        gradient = a @ w.T
        off = GROWTH * u * np.sqrt(a.shape[1]) * (np.abs(a) @ np.abs(w).T)
        hidden, derivatives = activate(products, self.kind), np.stack(slopes(products, self.kind), axis=1)
        long = np.abs(products[0]) * max(self.kind.slope, 1)
        steep = 2 + 2 * long
        other = 1 + self.kind.up_offset + np.abs(products[-1]) if self.kind.gated else np.ones_like(hidden)
        roundings = (MOST_SLOPE_ROUNDINGS + 10 + long) * u
        hidden_off = roundings * steep * (1 + long) * other
        slopes_off = np.stack([roundings * steep * other, roundings * steep * (1 + long)], axis=1)[:, : len(products)]
        f = self.factors.astype(np.float64)[:, None]
        least = float(finfo(self.a.dtype).smallest_subnormal) + 1.2e-38
        out, active, dots = (array.astype(np.float64) for array in got)
        expected = f[:, None] * gradient[:, None] * derivatives
        bound = np.abs(f[:, None]) * (off[:, None] * np.abs(derivatives) + np.abs(gradient[:, None]) * slopes_off)
        self.compare("out", out, expected, bound + element * np.abs(expected) + least)
        self.compare("active", active, f * hidden, np.abs(f) * (hidden_off + element * np.abs(hidden)) + least)
        dot_off = off * np.abs(hidden) + np.abs(gradient) * hidden_off + tile_n * u * np.abs(gradient * hidden)
        edges = np.arange(0, len(self.w), tile_n)
        total, bound = (np.add.reduceat(values, edges, axis=1) for values in (gradient * hidden, dot_off))
        self.compare("dots", dots, total, bound + least)

    def compare(self, name, got, expected, bound):
        wrong = ~(np.abs(got - expected) <= bound * (1 + 1e-6))
        if wrong.any():
            at = tuple(np.argwhere(wrong)[0])
            raise AssertionError(
                f"{self.dtype} {self.products.shape}, {self.kind}, {self.arithmetic}: {wrong.sum()} of {name} wrong, "
                f"first {at}: {got[at]!r}, expected {expected[at]!r} +- {bound[at]:.1e}"
            )


def make_derivative(dtype, rows, depth, columns, gated, name, seed=0, arithmetic="fma", **form):
    rng = np.random.default_rng(seed)
    sizes = dict(num_ranks=1, num_tokens=1, hidden=1, ffn=1, num_experts=1, num_topk=1)
    config = MoEConfig(**sizes, dtype=dtype)
    a, w, products = (
        rng.standard_normal(shape).astype(config.numpy_dtype)
        for shape in ((rows, depth), (columns, depth), (rows, 2 if gated else 1, columns))
    )
    factors = rng.uniform(-0.2, 1, rows).astype(config.accumulator)
    factors[3::7] = 0
    kind = ExpertKind(activation=name, gated=gated, **form)
    return Derivative(dtype, a, (w / depth**0.5).astype(w.dtype), products, factors, kind, arithmetic)


def arithmetics_of(dtype):
    return usable_arithmetics() if dtype == PAIRED_DTYPE else ["fma"]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_equal_float64(dtype, gated, name):
    for arithmetic in arithmetics_of(dtype):
        for rows, depth, columns, tile_n in ((23, 300, 37, 16), (1, 1, 1, 4), (7, 33, 67, 67)):
            case = make_derivative(dtype, rows, depth, columns, gated, name, 0, arithmetic)
            case.check(case.run(tile_n), tile_n)
    case = make_derivative(dtype, 4, 9, 7, gated, name)
    for targets in TARGETS[1:]:
        case.check(case.run(4, 3, targets), 4)


@pytest.mark.parametrize(("form", "name"), form_cases())
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_forms_equal_float64(dtype, form, name):
    plain, case = (make_derivative(dtype, 9, 30, 37, True, name, **more) for more in ({}, FORMS[form]))
    got = case.run(16)
    case.check(got, 16)
    assert (got[0] != plain.run(16)[0]).any(), f"{form} does nothing"
    few = make_derivative(dtype, 3, 9, 7, True, name, **FORMS[form])
    for targets in TARGETS[1:]:
        few.check(few.run(4, 2, targets), 4)


def next_up(values):
    return np.nextafter(values, np.asarray(np.inf, values.dtype))


@pytest.mark.parametrize("targets", TARGETS)
def test_at_a_limit_slopes_are_one_and_beyond_zero(targets):
    """Of relu, where dA and the factor are 1, so that `out` is the derivatives; nothing is rounded."""
    limit = np.float32(0.5)
    gates = np.array([limit, next_up(limit), 0.25, 0, -1, limit, limit], np.float32)
    ups = np.array([limit, limit, next_up(limit), limit, limit, -limit, -next_up(limit)], np.float32)
    expected = {
        "clamp": ([1.5, 0, 1.5, 0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0, 0, 0.5, 0]),
        "clamp_activated": ([1.5, 0, 1.5, 0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0, 0, 0.5, 0]),
    }
    for bound, (by_gate, by_up) in expected.items():
        kind = ExpertKind(activation="relu", gated=True, bound=bound, gate_limit=0.5, up_limit=0.5, up_offset=1.0)
        one = np.ones((1, 1), np.float32)
        case = Derivative("float32", one, np.ones((7, 1), np.float32), np.stack([gates, ups])[None], one[0], kind)
        out, active, dots = case.run(16, targets=targets)
        np.testing.assert_array_equal(out[0], [by_gate, by_up], f"{bound} on {targets}")
        hidden = np.clip(gates, 0, limit) * (np.clip(ups, -limit, limit) + 1)
        np.testing.assert_array_equal(active[0], hidden)
        assert dots[0, 0] == hidden.sum()


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rows_bits_do_not_depend_on_its_tile_or_place(dtype, targets):
    rows, columns = (40, 67) if targets[0] == "cpu" else (7, 9)
    for arithmetic in arithmetics_of(dtype) if targets[0] == "cpu" else ["fma"]:
        for form in ({}, FORMS["clamp"]):
            case = make_derivative(dtype, rows, 33, columns, True, "silu", 1, arithmetic, **form)
            whole = case.run(16, 1000, targets)
            for tile_m, scatter in ((3, None), (1000, 5), (5, 6)):
                got = case.run(16, tile_m, targets, scatter)
                assert_same_bits(got, whole, f"tiles of {tile_m}, scattered by {scatter}")
            for row in (0, rows - 1):
                alone = case.rows([row]).run(16, 1, targets)
                assert_same_bits(alone, [part[row : row + 1] for part in whole], f"row {row} alone")
            by_one_tile = case.run(128, 1000, targets)
            assert_same_bits(by_one_tile[:2], whole[:2], "in one tile of columns")


@pytest.mark.parametrize("targets", TARGETS)
def test_rows_of_no_weight_have_zeros(targets):
    """Whatever is not finite in their gradient, or in what was kept; their dots are as they are."""
    for gated in (False, True):
        case = make_derivative("float32", 5, 9, 7, gated, "silu")
        clean = case.run(4, targets=targets)
        case.factors[[1, 3]] = 0
        case.a[1, 2], case.products[3, 0, 5] = np.inf, np.nan
        out, active, dots = case.run(4, targets=targets)
        assert (out[[1, 3]] == 0).all() and (active[[1, 3]] == 0).all()
        assert not np.isfinite(dots[1]).any() and np.isnan(dots[3, 1]) and np.isfinite(dots[3, 0])
        for got, expected in zip((out, active, dots), clean, strict=True):
            assert_same_bits(got[[0, 2, 4]], expected[[0, 2, 4]], "the other rows")


@pytest.mark.parametrize("form", [{}, *FORMS.values()])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(form):
    for name in ("silu",) if form.get("bound") == "softcap" else ("silu", "relu", "gelu"):
        case = make_derivative("float32", 13, 30, 21, True, name, **form)
        case.factors[:] = 0.5
        clean, others = case.run(16), np.arange(13) != 6
        for part in range(2):
            bad = case.rows(np.arange(13))
            bad.products[6, part, 20] = np.nan
            got = bad.run(16)
            assert np.isnan(got[0][6, :, 20]).any() and np.isnan(got[1][6, 20]) and np.isnan(got[2][6, 1])
            for array, expected in zip(got, clean, strict=True):
                assert_same_bits(array[others], expected[others], f"{name}, NaN in part {part}")
        bad = case.rows(np.arange(13))
        bad.a[6, 29] = np.nan
        got = bad.run(16)
        assert np.isnan(got[0][6]).all() and np.isnan(got[2][6]).all()


@pytest.mark.parametrize("targets", TARGETS)
def test_no_rows_change_nothing(targets):
    case = make_derivative("float32", 3, 9, 7, True, "silu").rows([])
    assert [array.shape for array in case.run(4, targets=targets)] == [(0, 2, 7), (0, 7), (0, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_touches_its_own_memory_only(dtype):
    cases = [
        make_derivative(dtype, 13, 30, columns, gated, "silu", 0, arithmetic)
        for columns in (1, 67)
        for gated in (False, True)
        for arithmetic in arithmetics_of(dtype)
    ]
    expected = [case.run(tile_n=33) for case in cases]

    def check():
        for place in (at_the_end, at_the_start):
            for case, result in zip(cases, expected, strict=True):
                assert_same_bits(case.run(tile_n=33, place=place), result, f"{dtype}, {case.products.shape}")

    in_a_child(check)
