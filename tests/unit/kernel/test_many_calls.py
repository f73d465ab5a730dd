"""Nothing is cleared between calls: a layer is called thousands of times, with other token counts each time."""

import numpy as np
from cases import (
    Regions,
    assert_equals_oracle,
    assert_kept_nothing,
    assert_same_bits,
    counts_memory,
    held_memory,
    random_routing,
    random_tokens,
    tiny_config,
)

from flashmoe_numba import FlashMoE
from reference import Weights

NUM_CALLS, WARM_UP, SAMPLE = 10_000, 2_000, 100


@counts_memory
def test_ten_thousand_calls():
    config = tiny_config(num_tokens=9, num_ranks=2, capacity=5)
    weights, rng = Weights.random(config, bias=True), np.random.default_rng(0)
    pool = random_tokens(config, [64, 64])
    sampled, empty_ranks = 0, 0
    with FlashMoE(config, weights, num_processors=1) as layer:
        for call in range(1, NUM_CALLS + 1):
            counts = rng.choice([0, 0, 1, 2, 5, 9], size=config.num_ranks)
            starts = rng.integers(0, 64 - counts)
            x = [part[s : s + n] for part, s, n in zip(pool, starts, counts, strict=True)]
            routing = {}
            if call % 7 == 0:
                idx, factors = random_routing(config, counts, seed=call, bias=5.0)
                routing = dict(topk_idx=idx, topk_weights=factors)
            y = layer(x, **routing)
            empty_ranks += int((counts == 0).sum())
            if call % SAMPLE == 0:
                assert_equals_oracle(y, x, weights, config, layer.routing, external=bool(routing))
                assert layer.stats[0].epoch == call
                sampled += 1
            if call == WARM_UP:
                before = held_memory()
        growth = np.subtract(held_memory(), before)
    assert sampled == NUM_CALLS // SAMPLE and empty_ranks > NUM_CALLS // 4
    assert_kept_nothing(growth, NUM_CALLS - WARM_UP)


def test_a_thousand_calls_on_eight_ranks_in_every_dtype():
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(num_ranks=8, num_experts=16, num_topk=5, dtype=dtype)
        weights, rng = Weights.random(config), np.random.default_rng(1)
        x = random_tokens(config)
        with FlashMoE(config, weights, num_processors=2) as layer:
            full = layer(x)
            for call in range(500):
                counts = rng.integers(0, 8, 8)
                parts = [part[:n] for part, n in zip(x, counts, strict=True)]
                y = layer(parts)
                expected = [part[:n] for part, n in zip(full, counts, strict=True)]
                assert_same_bits(y, expected, f"{config}, call {call + 2}, counts {counts}")


def test_the_last_epochs_that_a_signal_word_can_hold():
    """The epoch has the upper half of a signed word, so a layer can make 2**31 - 1 calls."""
    config = tiny_config()
    weights, x = Weights.random(config), random_tokens(config)
    with FlashMoE(config, weights) as layer, FlashMoE(config, weights) as old:
        old._life.epoch = 2**31 - 7
        for counts in ([7, 7], [0, 3], [7, 0], [1, 1], [0, 0], [7, 7]):
            parts = [part[:n] for part, n in zip(x, counts, strict=True)]
            regions = Regions(old)
            regions.poison()
            y = old(parts)
            assert_same_bits(y, layer(parts), f"counts {counts}")
            regions.check(parts, y, old.routing, old._life.epoch)
        assert old._life.epoch == 2**31 - 1
