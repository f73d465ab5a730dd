"""The chain of equivalence of the backward: central differences = reference = kernel on fibers = kernel on threads.

The reference is compared with central differences in tests/unit/reference; here the kernel with the reference, in
float64, where nothing but the order of sums differs; and in every type, for the routing that the kernel had, within the
bounds of `gradient_tolerance`. Every save mode.
"""

from dataclasses import replace

import numpy as np
from backward_cases import assert_gradients_equal, assert_within_bounds, gradients_of
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import worlds

from reference.layout import SAVES

few = settings(max_examples=max(6, settings().max_examples // 2))
fibers = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**32), "lanes": st.integers(1, 3), "preempt": st.sampled_from([0.0, 0.3, 1.0])}
)


def run_backwards(world, save, data_seed, **settings):
    """All calls of a world are kept, then run backwards in another order, each compared with the reference."""
    for call, (x, given_routing) in gradients_of(world, save, data_seed, **settings):
        assert_gradients_equal(call, x, world.weights, world.config, given_routing)


@given(worlds(norms=True, dtypes=("float64",)), st.sampled_from(SAVES), st.integers(0, 99))
def test_gradients_on_threads_equal_the_reference(world, save, seed):
    run_backwards(world, save, seed)


@given(worlds(norms=True, dtypes=("float64",), max_calls=2), st.sampled_from(SAVES), st.integers(0, 99), fibers)
def test_gradients_on_fibers_equal_the_reference(world, save, seed, fibers):
    run_backwards(world, save, seed, backend="fibers", **fibers)


@given(worlds(kinds=True, norms=True, dtypes=("float64",)), st.sampled_from(SAVES), st.integers(0, 99))
def test_gradients_of_any_kind_on_threads_equal_the_reference(world, save, seed):
    run_backwards(world, save, seed)


@few
@given(
    worlds(kinds=True, norms=True, dtypes=("float64",), max_calls=1), st.sampled_from(SAVES), st.integers(0, 99), fibers
)
def test_gradients_of_any_kind_on_fibers_equal_the_reference(world, save, seed, fibers):
    run_backwards(world, save, seed, backend="fibers", **fibers)


@few
@given(worlds(norms=True, dtypes=("float32",), max_calls=2), st.sampled_from(SAVES), st.integers(0, 99))
def test_gradients_on_threads_are_within_the_derived_bounds(world, save, seed):
    for call, (x, _) in gradients_of(world, save, seed, outside=True):
        assert_within_bounds(call, x, world.weights, world.config)


@few
@given(worlds(norms=True, max_calls=1), st.sampled_from(SAVES), st.integers(0, 99), fibers)
def test_gradients_of_every_type_on_fibers_are_within_the_derived_bounds(world, save, seed, fibers):
    for call, (x, _) in gradients_of(world, save, seed, outside=True, backend="fibers", **fibers):
        assert_within_bounds(call, x, world.weights, world.config)


@few
@given(worlds(norms=True, dtypes=("float64",), max_calls=3), st.sampled_from(SAVES), st.integers(0, 99))
def test_sums_for_weights_go_on_from_call_to_call(world, save, seed):
    """Gradients of all calls in one array are the sums of those of each call."""
    world = replace(world, routings=[None if r is None else r for r in world.routings])
    each = [call.gradients for call, _ in gradients_of(world, save, seed)]
    *_, last = [call.gradients for call, _ in gradients_of(world, save, seed, accumulate=True)]
    for rank, sums in enumerate(last.weights):
        for name, array in vars(sums).items():
            if isinstance(array, np.ndarray):
                total = sum(getattr(gradients.weights[rank], name) for gradients in each)
                scale = sum(np.abs(getattr(gradients.weights[rank], name)) for gradients in each)
                assert (np.abs(array - total) <= 1e-13 * scale.max(initial=0)).all(), f"{world.config}: {name}"
