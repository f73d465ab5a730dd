"""Output bits depend on a token and the weights, and on nothing else, also on a GPU."""

from dataclasses import replace

import numpy as np
import pytest
from cases import assert_same_bits, random_routing, random_tokens
from gpu_cases import call, differing, make_layer, tensor_config, to_gpu

from reference import Weights

CALLS = 1000
DTYPES = ["float16", "bfloat16", "float32"]  # on Hopper: tensor cores, tensor cores, lanes


def split(tokens, num_ranks):
    return np.split(tokens, num_ranks)


def outputs(config, weights, tokens, num_ranks=1, **how):
    """`[tokens, hidden]` for global tokens shared out among ranks."""
    config = replace(config, num_ranks=num_ranks, num_tokens=len(tokens) // num_ranks)
    with make_layer(config, weights, **how) as layer:
        return np.concatenate(call(layer, split(tokens, num_ranks)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_thousand_calls_with_other_token_counts(dtype, num_ranks):
    """Rows of any call are those of the first one; calls are queued without waiting for each other."""
    config = tensor_config(dtype=dtype, num_ranks=num_ranks)
    weights, x = Weights.random(config, bias=True), [to_gpu(part) for part in random_tokens(config)]
    rng = np.random.default_rng(7)
    with make_layer(config, weights) as layer:
        full, wrong = layer(x), []
        for _ in range(CALLS):
            counts = rng.integers(0, config.num_tokens + 1, num_ranks)
            y = layer([part[:count] for part, count in zip(x, counts, strict=True)])
            wrong += [differing(a, b[: len(a)]) for a, b in zip(y, full, strict=True)]
        layer.synchronize()
        assert sum(map(int, wrong)) == 0, f"{sum(int(n) > 0 for n in wrong)} of {len(wrong)} results differ"
        assert layer.stats[0].epoch == CALLS + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_processors_do_not_matter(dtype):
    config = tensor_config(dtype=dtype)
    weights, (tokens,) = Weights.random(config, bias=True), random_tokens(config)
    expected = outputs(config, weights, tokens)  # as many as there can be
    for num_processors in (1, 2, 7):
        got = outputs(config, weights, tokens, num_processors=num_processors)
        assert_same_bits(got, expected, f"{num_processors} processors")


@pytest.mark.parametrize("dtype", DTYPES)
def test_virtual_ranks_do_not_matter(dtype):
    config = tensor_config(dtype=dtype, num_tokens=296)
    weights, (tokens,) = Weights.random(config, bias=True), random_tokens(config)
    expected = outputs(config, weights, tokens)
    for num_ranks in (2, 4, 8):
        assert_same_bits(outputs(config, weights, tokens, num_ranks), expected, f"{num_ranks} virtual ranks")


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_tiles_and_token_blocks_do_not_matter(dtype):
    config = tensor_config(dtype=dtype)
    weights, (tokens,) = Weights.random(config, bias=True), random_tokens(config)
    expected = outputs(config, weights, tokens)
    for tiling in (dict(tile_m_min=128), dict(tile_m=16), dict(tile_m=64, token_block=5)):
        assert_same_bits(outputs(replace(config, **tiling), weights, tokens), expected, f"{tiling}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_see_the_others(dtype):
    """A row alone is multiplied in a tile of 16 rows, in the full batch in one of 128: the same bits."""
    config = tensor_config(dtype=dtype)
    weights, (tokens,) = Weights.random(config, bias=True), random_tokens(config)
    order = np.random.default_rng(1).permutation(len(tokens))
    with make_layer(config, weights) as layer:
        idx, factors = random_routing(config, [len(tokens)], bias=50.0)  # all to the same experts
        hot = {"topk_idx": idx, "topk_weights": factors}
        for routing in ({}, hot):
            (full,) = call(layer, [tokens], **routing)
            shuffled = {name: [parts[0][order]] for name, parts in routing.items()}
            assert_same_bits(call(layer, [tokens[order]], **shuffled)[0], full[order], "shuffled")
            for first, last in ((0, 1), (17, 18), (299, 300), (40, 71), (100, 165)):
                part = {name: [parts[0][first:last]] for name, parts in routing.items()}
                (got,) = call(layer, [tokens[first:last]], **part)
                assert_same_bits(got, full[first:last], f"rows {first} to {last} alone, routing {sorted(routing)}")
