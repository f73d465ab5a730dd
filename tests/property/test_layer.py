"""The chain of equivalence: oracle = tiles in any legal order = kernel on fibers = kernel on threads.

Every link is compared with the oracle under the kernel's own routing, which must itself be a top-k of the exact logits
up to rounding: a near tie may fall either way. What moves between ranks is compared bit for bit.
"""

import numpy as np
from cases import Regions, assert_equals_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import worlds

from flashmoe_numba import FlashMoE
from reference import TiledLayer

fibers = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**32), "lanes": st.integers(1, 3), "preempt": st.sampled_from([0.0, 0.1, 0.5, 1.0])}
)


def run(world, **settings):
    """Every call of the world on one layer, each checked; returns (routings, y) of each call."""
    results = []
    with FlashMoE(world.config, world.weights, num_processors=world.num_processors, **settings) as layer:
        regions = Regions(layer)
        for epoch, (x, routing) in enumerate(world.calls(), start=1):
            regions.poison()
            y = layer(x, **routing)
            routings = layer.routing
            if routing:
                for given_idx, given_weights, used in zip(*routing.values(), routings, strict=True):
                    np.testing.assert_array_equal(used.topk_idx, given_idx)
                    np.testing.assert_array_equal(used.topk_weights, given_weights.astype(world.config.accumulator))
            assert_equals_oracle(y, x, world.weights, world.config, routings, external=bool(routing))
            regions.check(x, y, routings, epoch)
            check_stats(layer, x, routings, epoch)
            results.append((routings, y))
    return results


def check_stats(layer, x, routings, epoch):
    """The counters agree with a plain count."""
    config, stats = layer.config, layer.stats
    chosen = [np.bincount(r.topk_idx.ravel(), minlength=config.num_experts) for r in routings]
    sent = np.array([np.minimum(count, config.slots) for count in chosen])
    per_owner = sent.sum(axis=0).reshape(config.num_ranks, -1).sum(axis=1)
    for rank, s in enumerate(stats):
        got = (s.epoch, s.num_tokens, s.sent_rows, s.dropped_pairs, s.received_rows)
        expected = (epoch, len(x[rank]), sent[rank].sum(), (chosen[rank] - sent[rank]).sum(), per_owner[rank])
        assert got == expected, f"{config}, rank {rank}: {s}"
        assert s.received_rows <= s.padded_rows <= s.received_rows + s.row_tiles * (config.tile_m - 1), f"{config}: {s}"


@settings(max_examples=4 * settings().max_examples)
@given(worlds())
def test_kernel_on_threads_equals_the_oracle(world):
    run(world)


@given(worlds(max_calls=2), fibers)
def test_kernel_on_fibers_equals_the_oracle(world, fibers):
    run(world, backend="fibers", **fibers)


@given(worlds(max_calls=1), fibers, st.integers(0, 2**32))
def test_oracle_tiles_fibers_and_threads_agree_on_one_routing(world, fibers, order_seed):
    """One routing for all: the fibers' is given to the others from outside."""
    (x, _), config, weights = next(world.calls()), world.config, world.weights
    ((routings, _),) = run(world, backend="fibers", **fibers)
    world.routings = [([r.topk_idx for r in routings], [r.topk_weights for r in routings])]
    run(world, backend="cpu")
    run(world, backend="fibers", **fibers)
    tiled = TiledLayer(x, weights, config, *world.routings[0]).run(np.random.default_rng(order_seed))
    assert_equals_oracle(tiled, x, weights, config, routings, external=True)


@settings(max_examples=max(4, settings().max_examples // 4))
@given(worlds(max_calls=8, dtypes=("float32",), capacity=None), st.booleans())
def test_many_epochs_on_one_layer(world, on_fibers):
    """Longer histories than the other tests, which is where stale flags, counters and tasks would show."""
    run(world, backend="fibers" if on_fibers else "cpu", **({"lanes": 2} if on_fibers else {}))
