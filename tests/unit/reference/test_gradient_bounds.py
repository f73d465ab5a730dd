"""Bounds of gradients pass a backward that rounds as kernels do, and fail one with a small fault."""

from dataclasses import fields, replace

import numpy as np
import pytest
from kinds import EXPERTS, NORMED

from reference import ExpertKind, MoEConfig, RouterKind, Weights, gradient_tolerance, moe_layer, moe_layer_backward
from reference.activations import sigmoid
from reference.error_bounds import absolute_terms
from reference.expert_gradients import slopes
from reference.experts import activate
from reference.tolerance import tolerance

F32 = np.float32
SILU = ExpertKind(activation="silu", gated=True)
KINDS = {
    "silu": SILU,
    "gelu": ExpertKind(activation="gelu", gated=False),
    "relu": ExpertKind(activation="relu", gated=True),
    "relu2": ExpertKind(activation="relu2", gated=False),
    **EXPERTS,
    "normed": NORMED,
}


def product(a, b):
    """`a @ b` in float32, one term after the other."""
    total = np.zeros((len(a), b.shape[1]), F32)
    for k in range(a.shape[1]):
        total += a[:, k, None].astype(F32) * b[k].astype(F32)
    return total


class Backward:
    """A kernel's backward of one source, expert after expert: float32 sums, rows rounded to the element type.

    `fault` names what it does wrong.
    """

    def __init__(self, case, fault=""):
        self.config, self.fault, self.w, self.x, self.dy = case.config, fault, case.weights, case.x, case.dy
        self.arrays = {name: np.zeros(array.shape) for name, array in arrays_of(case.weights).items()}
        self.near_zero = 0  # elements of rows that are no normal numbers of float16
        dx, self.topk_weights = np.zeros(case.x.shape, F32), np.zeros(case.idx.shape)
        for e in range(self.config.num_experts):
            rows, places = np.nonzero(case.idx == e)
            d_rows, self.topk_weights[rows, places] = self.pairs(rows, case.factors[rows, places][:, None], e)
            dx[rows] += d_rows
        rows, places = np.nonzero(case.idx >= self.config.num_experts)
        self.topk_weights[rows, places] = (self.dy[rows].astype(F32) * self.x[rows]).sum(axis=1)
        np.add.at(dx, rows, case.factors[rows, places][:, None] * self.dy[rows].astype(F32))
        if self.config.shared_ffn:
            dx += self.shared()
        self.dx = self.rounded(dx)

    def rounded(self, values):
        return values.astype(self.config.numpy_dtype).astype(F32)

    def pairs(self, rows, factor, e):
        x, dy, kind = self.x[rows], self.dy[rows], self.config.expert_kind
        on_input = self.config.router_kind.weight_input
        given, outside = (self.rounded(x * factor), np.ones_like(factor)) if on_input else (x, factor)
        dx, d_factor, arrays = self.expert(given, dy, outside, self.w, e, kind)
        if kind.norm_eps is not None:
            self.arrays["result_scale"] += arrays.pop("result_scale")
        for name, array in arrays.items():
            self.arrays[name][e] = array
        return (factor * dx, (dx * x.astype(F32)).sum(axis=1)) if on_input else (dx, d_factor)

    def shared(self):
        gate = self.w.shared_gate_weight
        factor = sigmoid(product(self.x, gate[:, None]))
        dx, d_factor, arrays = self.expert(self.x, self.dy, factor, self.w.shared, 0, self.config.shared_kind)
        d_logits = d_factor[:, None] * factor * (1 - factor)
        arrays["gate_weight"] = product(self.x.T, d_logits)[:, 0]
        self.arrays |= {f"shared_{name}": array for name, array in arrays.items()}
        return dx + d_logits * gate.astype(F32)

    def expert(self, x, dy, factor, w, e, kind):
        biases = [F32(0) if bias is None else bias[e].astype(F32) for _, bias in w.ups]
        ups = [self.rounded(product(x, matrix[e].T) + b) for (matrix, _), b in zip(w.ups, biases, strict=True)]
        through = None
        if kind.norm_eps is not None:
            products = [product(x, matrix[e].T) + b for (matrix, _), b in zip(w.ups, biases, strict=True)]
            result = product(self.rounded(activate(products, kind)), w.down_proj[e].T)
            dy, *through = self.norm(self.rounded(result + w.down_bias[e].astype(F32)), dy, factor)
        hidden, d_hidden = activate(ups, kind), product(dy, w.down_proj[e])
        if self.fault == "a term less":
            d_hidden -= np.outer(dy[:, 4].astype(F32), w.down_proj[e, 4].astype(F32))
        d_factor = (d_hidden * hidden).sum(axis=1)
        if self.fault != "no bias in the gradient of weights":
            d_factor += product(dy, w.down_bias[e][:, None])[:, 0]
        d_factor = through[0] if through else d_factor
        weighed = self.rounded(factor * hidden)
        self.near_zero += (np.abs(weighed) < 2.0**-14).sum()
        if self.fault == "wA in float16":
            weighed = weighed.astype(np.float16)
        d_ups = [self.rounded(factor * d_hidden * slope) for slope in slopes(ups, kind)]
        if self.fault == "dh in float16":
            d_ups = [d_up.astype(np.float16) for d_up in d_ups]
        if self.fault == "a row less":
            d_ups[-1][-1] = 0
        arrays = {"down_proj": product(dy.T, weighed), "down_bias": (factor * dy.astype(F32)).sum(axis=0)}
        arrays |= {"result_scale": through[1]} if through else {}
        dx = np.zeros(x.shape, F32)
        for name, (matrix, _), d_up in zip(("gate", "up") if kind.gated else ("up",), w.ups, d_ups, strict=True):
            dx += product(d_up, matrix[e])
            arrays |= {f"{name}_proj": product(d_up.T, x), f"{name}_bias": d_up.sum(axis=0, dtype=F32)}
        return self.rounded(dx), d_factor, {name: a for name, a in arrays.items() if getattr(w, name) is not None}

    def norm(self, result, dy, factor):
        """(What an expert gets for dy, gradients of factors and of the scale.)"""
        scale, ones = self.w.result_scale.astype(F32), np.ones((result.shape[1], 1), F32)
        value, columns = scale * result, F32(result.shape[1])
        root = np.sqrt(product(value * value, ones) / columns + F32(self.config.expert_kind.norm_eps))
        dot = product(dy.astype(F32) * value, ones) / root
        mean = F32(0) if self.fault == "no mean" else dot / columns
        d_value = (dy.astype(F32) - value / root * mean) / root
        d_scale = product(factor.T, d_value * result)[0]
        return self.rounded(scale * d_value), dot[:, 0], d_scale


def arrays_of(weights):
    found = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return {name: array for name, array in found.items() if isinstance(array, np.ndarray)}


class Case:
    def __init__(self, kind=SILU, dtype="float32", seed=0, **changes):
        sizes = dict(num_ranks=1, num_tokens=29, hidden=45, ffn=37, num_experts=3, num_topk=2, shared_ffn=11)
        shared = dict(shared_expert=replace(kind, norm_eps=None))
        self.config = c = MoEConfig(**(sizes | dict(expert=kind, dtype=dtype, shared_gate=True) | shared | changes))
        rng = np.random.default_rng(seed)
        self.weights = Weights.random(c, seed=seed, bias=True)
        self.x, self.dy = rng.standard_normal((2, c.num_tokens, c.hidden)).astype(c.numpy_dtype)
        self.idx = np.argsort(rng.random((c.num_tokens, c.num_choices)), axis=1)[:, : c.num_topk]
        self.factors = rng.uniform(-1, 1, self.idx.shape).astype(F32)

    def excess(self, fault=""):
        """The largest error of each gradient, in units of its bound."""
        made, given = (
            Backward(self, fault),
            ([self.x], [self.dy], self.weights, self.config, [self.idx], [self.factors]),
        )
        exact, bound = moe_layer_backward(*given), gradient_tolerance(*given)
        found = {"x": largest(made.dx, exact.x[0], bound.x[0])}
        found |= {"topk_weights": largest(made.topk_weights, exact.topk_weights[0], bound.topk_weights[0])}
        both = arrays_of(exact.weights), arrays_of(bound.weights)
        return found | {name: largest(array, both[0][name], both[1][name]) for name, array in made.arrays.items()}


def largest(got, exact, bound):
    assert got.shape == exact.shape == bound.shape
    error = np.abs(got - exact)
    return float(np.divide(error, bound, out=np.where(error > 0, np.inf, 0.0), where=bound > 0).max())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_a_kernel_is_inside_and_not_far(name, dtype):
    """Relu and bounds bend at some products; and each gradient comes to a hundredth of its bound."""
    found = Case(KINDS[name], dtype).excess()
    assert max(found.values()) < 0.5, found
    rounded = {n: v for n, v in found.items() if n != "router" and (dtype == "float32" or "down_bias" not in n)}
    assert min(v for n, v in rounded.items() if not n.startswith("shared")) > 0.01, found
    assert min(rounded.values()) > 0.003, found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("changes", [
    dict(router=RouterKind(weight_input=True)), dict(num_zero=3, num_topk=4), dict(num_tokens=1, hidden=1, ffn=1),
    dict(num_topk=3, hidden=3, ffn=131), dict(num_tokens=301, hidden=5, ffn=3, num_experts=1, num_topk=1),
], ids=str)  # fmt: skip
def test_other_layers_are_inside(changes, dtype):
    for seed in range(3):
        found = Case(dtype=dtype, seed=seed, **changes).excess()
        assert max(found.values()) < 0.7, found


@pytest.mark.parametrize("num_tokens", [1, 29])
def test_rows_near_zero_are_inside(num_tokens):
    """Where elements of rows are below the smallest normal number of their type."""
    for seed in range(4):
        case = Case(dtype="float16", seed=seed, num_tokens=num_tokens, shared_ffn=0, shared_gate=False)
        case.factors = -np.abs(case.factors)
        case.x, case.weights = case.x / np.float16(64), replace(case.weights, gate_bias=None, up_bias=None)
        case.dy /= np.float16(256)
        assert Backward(case).near_zero > 40 * num_tokens
        assert max(case.excess().values()) < 0.7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gates_that_are_nearly_1_are_inside(dtype):
    """A factor f whose slope is made as f (1 - f)."""
    case = Case(dtype=dtype, num_tokens=1, num_topk=1, hidden=1, ffn=3)
    gate = float(case.weights.shared_gate_weight[0])
    case.x[...] = 12 / gate
    assert sigmoid(gate * case.x.astype(np.float64)) > 0.99999 and max(case.excess().values()) < 0.7


@pytest.mark.parametrize(("fault", "seen"), [
    ("a term less", {"x", "topk_weights", "up_proj", "gate_proj", "up_bias", "gate_bias"}),
    ("a row less", {"x", "up_proj", "up_bias"}),
    ("no bias in the gradient of weights", {"topk_weights"}),
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_missing_term_is_outside(dtype, fault, seen):
    excess = Case(dtype=dtype).excess(fault)
    assert {name for name, value in excess.items() if value > 1 and not name.startswith("shared")} >= seen, excess


@pytest.mark.parametrize(("fault", "seen"), [
    ("wA in float16", {"down_proj"}), ("dh in float16", {"x", "up_proj", "up_bias", "gate_proj"}),
])  # fmt: skip
def test_a_wrong_rounding_is_outside(fault, seen):
    excess = Case().excess(fault)
    assert {name for name, value in excess.items() if value > 1 and not name.startswith("shared")} >= seen, excess


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bounds_are_nearer_than_those_of_the_forward(dtype):
    """Both measured by the same layer: the error of its results, and that of the tokens' gradients."""
    case = Case(dtype=dtype, shared_ffn=0, shared_gate=False)
    exact = moe_layer(case.x, case.weights, case.config, case.idx, case.factors)
    y = np.zeros(case.x.shape, F32)
    for e in range(3):
        rows, places = np.nonzero(case.idx == e)
        ups = [product(case.x[rows], matrix[e].T) + bias[e].astype(F32) for matrix, bias in case.weights.ups]
        hidden = activate(ups, SILU).astype(case.config.numpy_dtype)
        result = product(hidden, case.weights.down_proj[e].T) + case.weights.down_bias[e].astype(F32)
        y[rows] += case.factors[rows, places][:, None] * result.astype(case.config.numpy_dtype).astype(F32)
    (terms,) = absolute_terms([case.x], case.weights, case.config, [case.idx], [case.factors])
    forward = largest(y.astype(case.config.numpy_dtype).astype(F32), exact, tolerance(case.config) * terms)
    assert 0 < forward < case.excess()["x"] < 0.5


def test_what_adds_nothing_has_no_bound():
    case = Case(shared_ffn=0, shared_gate=False)
    case.factors[3, 1], case.idx[4] = 0, -1
    bound = gradient_tolerance([case.x], [case.dy], case.weights, case.config, [case.idx], [case.factors])
    assert bound.topk_weights[0][3, 1] == 0 < bound.topk_weights[0][3, 0] and not bound.topk_weights[0][4].any()
    assert not bound.weights.router.any() and bound.logits is None
    assert bound.x[0][4].max() < 1e-40 < bound.x[0][3].min()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_norm_without_its_mean_is_outside(dtype):
    excess = Case(NORMED, dtype).excess("no mean")
    assert all(excess[name] > 1 for name in ("x", "up_proj", "down_proj", "down_bias", "result_scale")), excess
