"""Top-k, ties, bad rows, routings from outside, and the judge of other implementations' routings."""

import dataclasses
import re

import numpy as np
import pytest

from reference import MoEConfig, Routing, Weights, check_routing, external_routing, route, softmax_topk


def make_config(**fields):
    return MoEConfig(**(dict(num_ranks=2, num_tokens=40, hidden=33, ffn=8, num_experts=10, num_topk=3) | fields))


def test_known_row():
    routing = softmax_topk(np.log(np.array([[1.0, 4.0, 2.0, 3.0]])), 2, renormalize=False)
    assert routing.topk_idx.tolist() == [[1, 3]] and routing.topk_idx.dtype == np.int32
    np.testing.assert_allclose(routing.topk_weights, [[0.4, 0.3]])
    renormalized = softmax_topk(np.log(np.array([[1.0, 4.0, 2.0, 3.0]])), 2, renormalize=True)
    np.testing.assert_allclose(renormalized.topk_weights, [[4 / 7, 3 / 7]])


def test_ties_go_to_the_lowest_expert():
    logits = np.array([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    assert softmax_topk(logits, 4, True).topk_idx.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


def test_underflowing_probabilities_keep_the_order_of_logits():
    routing = softmax_topk(np.array([[-900.0, -850.0, 0.0, -800.0]], np.float32), 3, False)
    assert routing.topk_idx.tolist() == [[2, 3, 1]]
    assert routing.topk_weights.tolist() == [[1.0, 0.0, 0.0]] and routing.topk_weights.dtype == np.float32


def test_rows_without_a_finite_maximum():
    inf, nan = np.inf, np.nan
    logits = np.array([[0, nan, 1], [inf, 0, 0], [-inf, -inf, -inf], [-inf, 2, 1], [0, 1, nan], [3, 1, 2]])
    routing = softmax_topk(logits, 2, True)
    assert routing.topk_idx.tolist() == [[0, 1], [0, 1], [0, 1], [1, 2], [0, 1], [0, 2]]
    assert np.isnan(routing.topk_weights).all(axis=1).tolist() == [True, True, True, False, True, False]
    np.testing.assert_allclose(routing.topk_weights[3].sum(), 1)


def test_route_is_float64_of_16_bit_inputs():
    config = make_config(dtype="bfloat16")
    weights = Weights.random(config)
    x = np.random.default_rng(0).standard_normal((7, 33)).astype(config.numpy_dtype)
    routing = route(x, weights.router, config)
    logits = np.einsum("th,eh->te", x.astype(np.float64), weights.router.astype(np.float64))
    assert routing.topk_weights.dtype == np.float64
    np.testing.assert_array_equal(routing.topk_idx, np.argsort(-logits, axis=1)[:, :3])


@pytest.mark.parametrize(("dtype", "finite"), [("float32", False), ("bfloat16", False), ("float64", True)])
def test_logits_beyond_the_accumulator_are_infinite(dtype, finite):
    config = make_config(dtype=dtype, num_topk=2)
    x, router = np.zeros((3, 33)), np.zeros((10, 33))
    x[:, 0], router[4, 0], router[7, 0] = (1e20, -1e20, 1), 1e20, -1e20
    routing = route(x.astype(config.numpy_dtype), router.astype(config.accumulator), config)
    chosen = [[4, 0], [7, 0], [4, 0]] if finite else [[0, 1], [0, 1], [4, 0]]
    assert routing.topk_idx.tolist() == chosen
    assert np.isfinite(routing.topk_weights).all(axis=1).tolist() == [finite, finite, True]


def test_external_routing_copies_and_casts():
    config = make_config()
    for idx_dtype, weights_dtype in ((np.uint8, np.float64), (np.int32, np.float32)):
        idx, weights = np.array([[9, 0, 4]], idx_dtype), np.array([[0.5, 0.25, np.nan]], weights_dtype)
        routing = external_routing(idx, weights, config, 1)
        idx[:], weights[:] = 1, 1
        assert routing.topk_idx.tolist() == [[9, 0, 4]] and routing.topk_idx.dtype == np.int32
        assert routing.topk_weights[0, :2].tolist() == [0.5, 0.25] and routing.topk_weights.dtype == np.float32
    assert external_routing(np.empty((0, 3), int), np.empty((0, 3)), config, 0).topk_idx.shape == (0, 3)


@pytest.mark.parametrize("idx_dtype", [np.int8, np.uint8, np.int64, np.uint64])
def test_no_choice_has_index_minus_one_and_weight_zero_whatever_was_given(idx_dtype):
    """Frameworks pad with -1 or with num_experts, and with any factor."""
    signed = np.issubdtype(idx_dtype, np.signedinteger)
    none = -1 if signed else 10
    idx = np.array([[none, 4, 10], [10, none, 10], [0, 9, 1]], idx_dtype)
    weights = np.array([[np.nan, 0.5, np.inf], [1e300, np.nan, 2], [np.nan, 0.25, np.inf]])
    routing = external_routing(idx, weights, make_config(), 3)
    assert routing.topk_idx.tolist() == [[-1, 4, -1], [-1, -1, -1], [0, 9, 1]] and routing.topk_idx.dtype == np.int32
    np.testing.assert_array_equal(routing.topk_weights, [[0, 0.5, 0], [0, 0, 0], [np.nan, 0.25, np.inf]])
    assert idx[0, 2] == 10 and np.isnan(weights[0, 0]), "the caller's arrays were changed"


@pytest.mark.parametrize(("idx", "error", "message"), [
    ([[0, 1, 2], [3, 11, 4]], ValueError,
     r"values must be in \[0, num_experts=10\), or -1 or 10 for no choice, got \[3, 11, 4\] in row 1"),
    ([[0, 1, 2], [3, 4, -2]], ValueError, r"values must be in .* got \[3, 4, -2\] in row 1"),
    ([[0, 1, 2], [-1, 4, 4]], ValueError, r"the experts of a token must be distinct, got \[-1, 4, 4\] in row 1"),
    ([[5, 1, 5], [3, 4, 1]], ValueError, r"the experts of a token must be distinct, got \[5, 1, 5\] in row 0"),
    ([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], TypeError, "topk_idx must have an integer dtype, got float64"),
    ([[0, 1], [3, 4]], ValueError, r"topk_idx must have shape \[2, 3\], got \[2, 2\]"),
])  # fmt: skip
def test_external_routing_rejects_indices(idx, error, message):
    with pytest.raises(error, match=message):
        external_routing(np.array(idx), np.ones((2, 3)), make_config(), 2)


def test_external_routing_rejects_weights():
    idx = np.array([[0, 1, 2]])
    with pytest.raises(TypeError, match=r"topk_weights must have a floating dtype .* got int64"):
        external_routing(idx, np.ones((1, 3), int), make_config(), 1)
    with pytest.raises(ValueError, match=r"topk_weights must have shape \[1, 3\], got \[1, 2\]"):
        external_routing(idx, np.ones((1, 2)), make_config(), 1)
    with pytest.raises(TypeError, match="topk_idx must be a NumPy array, got list"):
        external_routing(idx.tolist(), np.ones((1, 3)), make_config(), 1)


def kernel_routing(x, router, config):
    """As a kernel computes it: every partial sum rounded to float32, from the first to the last element."""
    logits = np.zeros((len(x), len(router)), np.float32)
    for h in range(config.hidden):
        logits += x[:, h, None].astype(np.float32) * router[:, h].astype(np.float32)
    return softmax_topk(logits, config.num_topk, config.renormalize)


@pytest.fixture(params=["float32", "bfloat16", "float64"])
def judged(request):
    config = make_config(dtype=request.param, renormalize=request.param != "float32")
    x = np.random.default_rng(1).standard_normal((40, 33)).astype(config.numpy_dtype)
    router = Weights.random(config).router
    routing = kernel_routing(x, router, config) if request.param != "float64" else route(x, router, config)
    return config, x, router, routing


def test_check_routing_accepts_a_kernel(judged):
    config, x, router, routing = judged
    assert check_routing(routing, x, router, config) is None
    x[4, 0], x[5, 1] = np.nan, np.inf
    assert check_routing(routing, x, router, config) is None, "rows that are not finite are skipped"
    none = Routing(routing.topk_idx[:0], routing.topk_weights[:0])
    assert check_routing(none, x[:0], router, config) is None


def test_check_routing_accepts_tokens_so_large_that_any_weight_may_come_out():
    """A logit may then be off by more than exp can hold, and the margin must not become 0 * inf."""
    config = make_config(num_ranks=1, num_topk=2)
    x = 1e8 * np.random.default_rng(0).standard_normal((5, config.hidden)).astype(np.float32)
    router = Weights.random(config).router
    assert check_routing(route(x, router, config), x, router, config) is None


def test_check_routing_accepts_near_ties_either_way():
    config = make_config(num_topk=2)
    router = np.random.default_rng(0).standard_normal((10, 33)).astype(np.float32)
    router[7] = np.nextafter(router[2], np.float32(9))
    x = router[2:3] * np.float32(0.1)  # experts 2 and 7 are best by far
    logits = x.astype(np.float64) @ router.T.astype(np.float64)
    for order in ([2, 7], [7, 2]):
        weights = np.exp(logits[:, order]) / np.exp(logits[:, order]).sum()
        assert check_routing(Routing(np.array([order]), weights), x, router, config) is None


@pytest.mark.parametrize(("change", "message"), [
    (lambda idx, w: idx.__setitem__((6, 2), 9 - idx[6, 2]), "token 6"),
    (lambda idx, w: idx.__setitem__(8, idx[8][[1, 0, 2]]), "token 8.*not in falling order"),
    (lambda idx, w: idx.__setitem__((9, 1), idx[9, 0]), "token 9.*must be distinct"),
    (lambda idx, w: idx.__setitem__((3, 0), 10), r"token 3.*in \[0, 10\)"),
    (lambda idx, w: w.__setitem__((11, 1), w[11, 1] * 1.001), "token 11.*not that expert's"),
    (lambda idx, w: w.__setitem__((12, 2), np.nan), "token 12.*not that expert's"),
    (lambda idx, w: w.__imul__(1.001), "token 0.*not that expert's"),
])  # fmt: skip
def test_check_routing_names_the_bad_token(judged, change, message):
    config, x, router, routing = judged
    idx, weights = routing.topk_idx.copy(), routing.topk_weights.copy()
    change(idx, weights)
    complaint = check_routing(Routing(idx, weights), x, router, config)
    assert complaint is not None
    assert re.search(message, complaint), complaint


def test_check_routing_finds_a_worse_expert(judged):
    config, x, router, routing = judged
    best_four = route(x, router, dataclasses.replace(config, num_topk=4)).topk_idx
    idx = routing.topk_idx.copy()
    idx[20, 2] = best_four[20, 3]
    complaint = check_routing(Routing(idx, routing.topk_weights), x, router, config)
    assert complaint is not None and complaint.startswith("token 20") and "below the k-th best" in complaint
