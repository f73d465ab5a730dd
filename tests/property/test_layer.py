"""The chain of equivalence: oracle = tiles in any legal order = kernel on fibers = kernel on threads.

Every link is compared with the oracle under the kernel's own routing, which must itself be a top-k of the exact logits
up to rounding: a near tie may fall either way. What moves between ranks is compared bit for bit.
"""

import numpy as np
from cases import arithmetic_setting, assert_equals_oracle, usable_arithmetics
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import run_world, worlds

from reference import TiledLayer

fibers = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**32), "lanes": st.integers(1, 3), "preempt": st.sampled_from([0.0, 0.1, 0.5, 1.0])}
)


@settings(max_examples=4 * settings().max_examples)
@given(worlds(), st.sampled_from(usable_arithmetics()))
def test_kernel_on_threads_equals_the_oracle(world, arithmetic):
    run_world(world, **arithmetic_setting(world.config, arithmetic))


@given(worlds(), fibers)
def test_kernel_on_fibers_equals_the_oracle(world, fibers):
    run_world(world, backend="fibers", **fibers)


@given(worlds(kinds=True))
def test_kernel_of_any_kind_on_threads_equals_the_oracle(world):
    run_world(world)


@given(worlds(kinds=True, max_calls=2), fibers)
def test_kernel_of_any_kind_on_fibers_equals_the_oracle(world, fibers):
    run_world(world, backend="fibers", **fibers)


@given(worlds(max_calls=1), fibers, st.integers(0, 2**32))
def test_oracle_tiles_fibers_and_threads_agree_on_one_routing(world, fibers, order_seed):
    """One routing for all: the fibers' is given to the others from outside."""
    (x, _), config, weights = next(world.calls()), world.config, world.weights
    ((routings, _),) = run_world(world, backend="fibers", **fibers)
    world.routings = [([r.topk_idx for r in routings], [r.topk_weights for r in routings])]
    run_world(world, backend="cpu")
    run_world(world, backend="fibers", **fibers)
    tiled = TiledLayer(x, weights, config, *world.routings[0]).run(np.random.default_rng(order_seed))
    assert_equals_oracle(tiled, x, weights, config, routings, external=True)


@settings(max_examples=max(4, settings().max_examples // 4))
@given(worlds(max_calls=8, dtypes=("float32",), capacity=None), st.booleans())
def test_many_epochs_on_one_layer(world, on_fibers):
    """Longer histories than the other tests, which is where stale flags, counters and tasks would show."""
    run_world(world, backend="fibers" if on_fibers else "cpu", **({"lanes": 2} if on_fibers else {}))
