"""Output bits depend on a token and the weights, and on nothing else.

Not on the run, the number of ranks, of processors, the tile sizes, whose rows share tiles, the other tokens of the
batch, nor (on fibers) the interleaving. A token that is not finite spoils its own row only.
"""

from dataclasses import replace

import numpy as np
import pytest
from cases import (
    DTYPES,
    arithmetic_setting,
    assert_equals_oracle,
    assert_same_bits,
    finfo,
    random_tokens,
    tiny_config,
    usable_arithmetics,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import configs

from flashmoe_numba import FlashMoE
from reference import ACTIVATIONS, MoEConfig, Weights
from reference.runs import PACKINGS

few = settings(max_examples=max(6, settings().max_examples // 2))
NUM_GLOBAL = 24


@st.composite
def dropless_layers(draw, max_hidden, **fixed):
    """(config of one rank, weights): 8 experts, so that 1, 2, 4 and 8 ranks can share them."""
    config = MoEConfig(
        num_ranks=1,
        num_tokens=NUM_GLOBAL,
        hidden=draw(st.sampled_from([1, 9, 33, 300]).filter(lambda n: n <= max_hidden)),
        ffn=draw(st.sampled_from([1, 7, 40, 530]).filter(lambda n: n <= max_hidden * 2)),
        num_experts=8,
        num_topk=draw(st.sampled_from([1, 2, 3, 8])),
        gated=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        dtype=draw(st.sampled_from(["float32", *DTYPES])),
        renormalize=draw(st.booleans()),
        **fixed,
    )
    return config, Weights.random(config, seed=draw(st.integers(0, 9)), bias=draw(st.booleans()))


def tilings():
    """Legal tile sizes of every kind."""
    return st.builds(
        lambda shortest, ratio, tile_n, token_block: dict(
            tile_m_min=shortest, tile_m=shortest * ratio, tile_n=tile_n, token_block=token_block
        ),
        st.sampled_from([1, 2, 5, 16]),
        st.sampled_from([1, 2, 8]),
        st.sampled_from([1, 3, 16, 50, 128]),
        st.sampled_from([1, 3, 8, 32]),
    )


def split(tokens, num_ranks, rng):
    """The tokens in order over the ranks; without `rng` evenly, else at random places, so that some ranks have none."""
    if rng is None:
        return np.split(tokens, num_ranks)
    return np.split(tokens, np.sort(rng.integers(0, len(tokens) + 1, num_ranks - 1)))


def result(config, weights, tokens, num_ranks=1, rng=None, num_processors=1, **settings):
    """`[tokens, hidden]`: the layer's output for global tokens, wherever they lie."""
    with FlashMoE(replace(config, num_ranks=num_ranks), weights, num_processors=num_processors, **settings) as layer:
        return np.concatenate(layer(split(tokens, num_ranks, rng)))


@given(
    dropless_layers(max_hidden=300),
    st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), tilings(), st.sampled_from(PACKINGS)),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from(usable_arithmetics()),
    st.integers(0, 2**32),
)
def test_ranks_processors_and_tiles_do_not_matter(layer, variants, arithmetic, seed):
    config, weights = layer
    (tokens,) = random_tokens(config, seed=seed)
    tokens[7] = tokens[3]  # a pair that is equal although its rows lie in other places of other tiles
    how = arithmetic_setting(config, arithmetic)
    expected = result(config, weights, tokens, **how)
    assert_same_bits(expected[7], expected[3], f"{config}: two equal tokens")
    for turn, (num_ranks, num_processors, tiling, packing) in enumerate(variants):
        rng = None if turn == 0 else np.random.default_rng(seed + turn)
        where = f"{num_ranks} ranks, {num_processors} processors"
        how["packing"] = packing
        y = result(replace(config, **tiling), weights, tokens, num_ranks, rng, num_processors, **how)
        assert_same_bits(y, expected, f"{config} on {where}, {tiling}, packing {packing}")


@few
@given(dropless_layers(max_hidden=300), st.integers(1, 4), st.integers(0, 2**32))
def test_a_token_does_not_see_the_others(layer, num_processors, seed):
    config, weights = layer
    (tokens,) = random_tokens(config, seed=seed)
    order = np.random.default_rng(seed).permutation(NUM_GLOBAL)
    with FlashMoE(config, weights, num_processors=num_processors) as layer:
        y = layer([tokens])[0]
        assert_same_bits(layer([tokens[order]])[0], y[order], f"{config}: shuffled")
        for first, last in ((0, 1), (NUM_GLOBAL - 1, NUM_GLOBAL), (5, 12)):
            assert_same_bits(layer([tokens[first:last]])[0], y[first:last], f"{config}: rows {first} to {last} alone")
        assert_same_bits(layer([tokens])[0], y, f"{config}: the same call again")


@few
@given(
    configs(max_ranks=3, dtypes=("float32", "bfloat16"), capacity=None),
    st.lists(
        st.tuples(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4), st.sampled_from(PACKINGS)),
        min_size=2,
        max_size=3,
    ),
)
def test_fibers_give_the_same_bits_in_every_interleaving(config, variants):
    weights, x = Weights.random(config, bias=True), random_tokens(config)
    runs = []
    for seed, lanes, num_processors, packing in variants:
        settings = dict(backend="fibers", seed=seed, lanes=lanes, num_processors=num_processors, packing=packing)
        with FlashMoE(config, weights, **settings) as layer:
            runs.append((settings, layer(x)))
    for settings, y in runs[1:]:
        assert_same_bits(y, runs[0][1], f"{config}: {settings} against {runs[0][0]}")


@given(configs(max_ranks=3), st.integers(1, 4), st.integers(0, 2**32))
def test_capacity_drops_the_same_rows_in_every_run(config, num_processors, seed):
    """Which pairs are dropped follows from the tokens' order, not from timing."""
    weights, x = Weights.random(config), random_tokens(config, seed=seed)
    with FlashMoE(config, weights, num_processors=num_processors) as layer:
        first = layer(x)
    with FlashMoE(replace(config, token_block=4), weights, num_processors=1, packing="none") as layer:
        assert_same_bits(layer(x), first, f"{config}")


@pytest.mark.parametrize("backend", ["cpu", "fibers"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "largest"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_token_spoils_only_its_own_row(dtype, value, backend):
    config = tiny_config(dtype=dtype, num_topk=3)
    weights, x = Weights.random(config, bias=True), random_tokens(config)
    with FlashMoE(config, weights, backend=backend, num_processors=2) as layer:
        clean = layer(x)
        for rank, token, column in ((0, 0, 0), (1, 6, 8), (1, 3, 4)):
            bad = [part.copy() for part in x]
            if value == "largest":
                bad[rank][token] = finfo(config.numpy_dtype).max  # finite, but products and sums overflow
            else:
                bad[rank][token, column] = float(value)
            y = layer(bad)
            case = f"{config}, {backend}, {value} in token {token} of rank {rank}"
            if value != "largest":
                assert not np.isfinite(y[rank][token].astype(np.float64)).any(), f"{case}: {y[rank][token]}"
            for part, clean_part in zip(y, clean, strict=True):
                keep = np.ones(len(part), bool)
                keep[token] = part is not y[rank]
                assert_same_bits(part[keep], clean_part[keep], f"{case}: another row")
        assert_same_bits(layer(x), clean, f"{config}, {backend}: a clean call after bad ones")


@pytest.mark.parametrize("backend", ["cpu", "fibers"])
def test_every_row_bad_or_an_unrouted_bad_row_hangs_nothing(backend):
    config = tiny_config(capacity=2)
    weights, x = Weights.random(config), random_tokens(config)
    with FlashMoE(config, weights, backend=backend, num_processors=2) as layer:
        clean = layer(x)
        spoilt = layer([np.full_like(part, np.nan) for part in x])
        for part in spoilt:  # all tokens choose experts 0 and 1, which take two each; the others are dropped
            assert np.isnan(part[:2]).all() and (part[2:] == 0).all(), f"{part}"
        idx, factors = np.tile([3, 1], (7, 1)), np.full((7, 2), 0.5)
        dropped = [part.copy() for part in x]
        dropped[1][6] = np.inf
        y = layer(dropped, topk_idx=[idx, idx], topk_weights=[factors, factors])
        assert (y[1][2:] == 0).all(), f"a dropped row that is not finite: {y[1]}"
        assert_equals_oracle(y, dropped, weights, config, layer.routing, external=True)
        assert_same_bits(layer(x), clean, "a clean call after bad ones")


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_logits_go_to_the_lowest_expert(dtype):
    config = tiny_config(dtype=dtype, num_experts=6, num_topk=3)
    weights = Weights.random(config)
    weights.router[:] = weights.router[[0, 1, 0, 1, 0, 1]]  # only two different rows: every choice is a tie
    x = random_tokens(config)
    for backend in ("cpu", "fibers"):
        with FlashMoE(config, weights, backend=backend) as layer:
            layer(x)
            chosen = np.concatenate([routing.topk_idx for routing in layer.routing])
        assert {tuple(row) for row in chosen.tolist()} == {(0, 2, 4), (1, 3, 5)}, f"{backend}: {chosen.tolist()}"
