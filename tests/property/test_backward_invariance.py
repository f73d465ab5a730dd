"""Gradients' bits depend on tokens, weights and what comes in, and on nothing else.

Not on the run, the number of ranks and of processors, whose rows share tiles, what is kept, nor (on fibers) the
interleaving; nor on the sizes of tiles, but for how many columns of hidden rows a tile has, by which dots are added up.
The tokens of all ranks follow each other in one order; gradients of router and shared expert are each rank's own.
"""

from dataclasses import replace

import numpy as np
import pytest
from backward_cases import arrays_of, is_replicated
from cases import arithmetic_setting, assert_same_bits, random_tokens, tiny_config, usable_arithmetics
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import NORMED
from test_layer_invariance import NUM_GLOBAL, dropless_layers, split, tilings
from worlds import configs, with_norm

from flashmoe_numba import FlashMoE
from reference import Weights
from reference.layout import SAVES
from reference.router_extras import random_extras
from reference.runs import PACKINGS

BY_NO_DOTS = {"up_proj", "gate_proj", "down_proj", "up_bias", "gate_bias", "down_bias"}
OF_PAIRS = {"topk_weights of call 0", "topk_weights of call 1"}  # with a norm, whose dots are each of one lane
few = settings(max_examples=max(6, settings().max_examples // 2))


def gradients(config, weights, tokens, dys, num_ranks=1, rng=None, save=SAVES[0], num_processors=1, **settings):
    """Arrays by name: of all tokens, and of all experts, of two calls whose sums for weights go on."""
    state = rng and rng.bit_generator.state
    with FlashMoE(
        replace(config, num_ranks=num_ranks), weights, num_processors=num_processors, save=save, **settings
    ) as layer:
        sums, found = None, {}
        for call, dy in enumerate(dys):
            if rng:
                rng.bit_generator.state = state  # both are split alike
            _, saved = layer.forward(split(tokens, num_ranks, rng))
            if rng:
                rng.bit_generator.state = state
            sums = layer.backward(saved, split(dy, num_ranks, rng), into=sums)
            for name in ("x", "topk_weights", "logits"):
                found[f"{name} of call {call}"] = np.concatenate(getattr(sums, name))
    of_ranks = [arrays_of(of_rank) for of_rank in sums.weights]
    for name in of_ranks[0]:
        if not is_replicated(name):
            found[name] = np.concatenate([arrays[name] for arrays in of_ranks])
    return found


def assert_same_gradients(got, expected, case):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert_same_bits(got[name], array, f"{case}: {name}")


@st.composite
def layers(draw):
    """Half of them with a norm of results."""
    config, weights = draw(dropless_layers(max_hidden=33))
    if draw(st.booleans()):
        return config, weights
    config = with_norm(draw, config)
    return config, replace(weights, **random_extras(config, 0))


@few
@given(
    layers(),
    st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.sampled_from(PACKINGS), st.sampled_from(SAVES)),
        min_size=2,
        max_size=4,
    ),
    st.sampled_from(usable_arithmetics()),
    st.integers(0, 2**32),
)
def test_ranks_processors_packing_and_what_is_kept_do_not_matter(layer, variants, arithmetic, seed):
    config, weights = layer
    (tokens,) = random_tokens(config, seed=seed)
    dys = [random_tokens(config, seed=seed + turn)[0] for turn in (1, 2)]
    how = arithmetic_setting(config, arithmetic)
    expected = gradients(config, weights, tokens, dys, **how)
    for turn, (num_ranks, num_processors, packing, save) in enumerate(variants):
        rng = None if turn == 0 else np.random.default_rng(seed + turn)
        how |= dict(packing=packing, save=save, num_processors=num_processors)
        got = gradients(config, weights, tokens, dys, num_ranks, rng, **how)
        assert_same_gradients(got, expected, f"{config} on {num_ranks} ranks, {how}")


@few
@given(layers(), tilings(), tilings(), st.integers(0, 2**32))
def test_the_sizes_of_tiles_matter_to_dots_only(layer, sizes, others, seed):
    config, weights = layer
    (tokens,), dys = random_tokens(config, seed=seed), random_tokens(config, seed=seed + 1)
    expected = gradients(replace(config, **sizes), weights, tokens, dys)
    of_rows = others | {"tile_n": sizes["tile_n"]}
    got = gradients(replace(config, **of_rows), weights, tokens, dys)
    assert_same_gradients(got, expected, f"{config}: {sizes}, {of_rows}")
    got = gradients(replace(config, **others), weights, tokens, dys)
    exact = BY_NO_DOTS if config.expert_kind.norm_eps is None else BY_NO_DOTS | OF_PAIRS
    for name in exact & expected.keys():
        assert_same_bits(got[name], expected[name], f"{config}: {sizes}, {others}: {name}")


@few
@given(
    configs(norms=True, max_ranks=3, dtypes=("float32", "bfloat16"), capacity=None),
    st.lists(
        st.tuples(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4), st.sampled_from(PACKINGS)),
        min_size=2,
        max_size=3,
    ),
)
def test_fibers_give_the_same_gradients_in_every_interleaving(config, variants):
    weights, x, dy = Weights.random(config, bias=True), random_tokens(config), random_tokens(config, seed=1)
    runs = []
    for seed, lanes, num_processors, packing in variants:
        how = dict(backend="fibers", seed=seed, lanes=lanes, num_processors=num_processors, packing=packing)
        with FlashMoE(config, weights, save="rows", **how) as layer:
            found = layer.backward(layer.forward(x)[1], dy)
        arrays = {"x": np.concatenate(found.x), "logits": np.concatenate(found.logits)}
        for rank, of_rank in enumerate(found.weights):
            arrays |= {f"{name} of rank {rank}": array for name, array in arrays_of(of_rank).items()}
        runs.append((how, arrays))
    for how, arrays in runs[1:]:
        assert_same_gradients(arrays, runs[0][1], f"{config}: {how} against {runs[0][0]}")


@pytest.mark.parametrize("expert", [None, NORMED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_long_call_and_several_short_ones_add_up_alike(dtype, expert):
    """A chain of multiply-adds goes on where the last call ended, so micro-batches are one batch."""
    config = tiny_config(num_ranks=1, num_tokens=NUM_GLOBAL, dtype=dtype, num_topk=2, expert=expert)
    weights, (x,), (dy,) = Weights.random(config, bias=True), random_tokens(config), random_tokens(config, seed=1)
    with FlashMoE(config, weights, save="rows+up", num_processors=2) as layer:
        whole = layer.backward(layer.forward([x])[1], [dy])
        sums = None
        for first, last in ((0, 5), (5, 6), (6, NUM_GLOBAL)):
            sums = layer.backward(layer.forward([x[first:last]])[1], [dy[first:last]], into=sums)
    for name, array in arrays_of(whole.weights[0]).items():
        assert_same_bits(getattr(sums.weights[0], name), array, name)


@pytest.mark.parametrize("backend", ["cpu", "fibers"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_bad_gradient_spoils_its_own_token_and_what_sums_over_it(value, backend):
    config = tiny_config()
    weights, x, dy = Weights.random(config, bias=True), random_tokens(config), random_tokens(config, seed=1)
    with FlashMoE(config, weights, backend=backend, save="rows+up", num_processors=2) as layer:
        clean = layer.backward(layer.forward(x)[1], dy)
        chosen = layer.routing[1].topk_idx[3]
        bad = [part.copy() for part in dy]
        bad[1][3, 4] = float(value)
        spoilt = layer.backward(layer.forward(x)[1], bad)
    assert not np.isfinite(spoilt.x[1][3]).any()
    for rank, (got, right) in enumerate(zip(spoilt.x, clean.x, strict=True)):
        keep = np.arange(len(right)) != (3 if rank == 1 else -1)
        assert_same_bits(got[keep], right[keep], f"rank {rank}: another row")
    here = config.num_experts_per_rank
    for e in range(config.num_experts):
        got, right = (found.weights[e // here].down_proj[e % here] for found in (spoilt, clean))
        if e in chosen:
            assert not np.isfinite(got).all()
        else:
            assert_same_bits(got, right, f"expert {e}, which the token did not choose")
