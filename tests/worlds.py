"""Strategies that build legal layers with something to run on them, and a run in which everything is checked."""

import contextlib
import sys
from dataclasses import dataclass, replace

import numpy as np
from cases import Regions, assert_equals_oracle, random_routing, random_tokens, with_no_choices
from hypothesis import strategies as st
from kinds import expert_kinds, router_kinds

from flashmoe_numba import FlashMoE
from flashmoe_numba.device import st_release
from reference import ACTIVATIONS, MoEConfig, Weights
from reference.runs import tiling_problem


@dataclass
class LayerCalls:
    """A layer, and several calls of it: the tokens of each rank, and for each call a routing or None."""

    config: MoEConfig
    weights: Weights
    num_processors: int
    x: list[list[np.ndarray]]
    routings: list[tuple[list[np.ndarray], list[np.ndarray]] | None]

    def calls(self):
        """(x, keyword arguments of the call) of each call."""
        for x, routing in zip(self.x, self.routings, strict=True):
            if routing is not None and self.config.router_kind.choice == "given":
                yield x, {"topk_idx": routing[0]}
            else:
                yield x, dict(zip(("topk_idx", "topk_weights"), routing, strict=True)) if routing else {}


@st.composite
def extras(draw, num_experts):
    """Fields of a shared expert and of zero-computation experts, in most layers neither, and a num_topk that fits."""
    num_zero, width = draw(st.sampled_from([0, 0, 0, 1, 3])), draw(st.sampled_from([0, 0, 1, 5, 12]))
    choices = num_experts + num_zero
    return dict(
        num_topk=draw(st.sampled_from(sorted({1, min(2, choices), min(3, choices), choices}))),
        shared_ffn=width,
        shared_gate=width > 0 and draw(st.booleans()),
        num_zero=num_zero,
        zero=draw(st.sampled_from(["identity", "identity", "none"])),
    )


@st.composite
def configs(
    draw,
    max_ranks=4,
    dtypes=("float32",) * 4 + ("float64",) * 2 + ("float16", "bfloat16"),
    kinds=False,
    norms=False,
    **fixed,
):
    """With `kinds`, of any kind of router and experts, instead of softmax and plain experts; with `norms`, half of the
    layers with a norm of results.
    """
    num_ranks = draw(st.integers(1, max_ranks))
    num_experts = num_ranks * draw(st.integers(1, max(1, 8 // num_ranks)))
    num_tokens = draw(st.integers(1, 9))
    tile_m_min = draw(st.sampled_from([1, 2, 3]))
    sizes = dict(
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        hidden=draw(st.sampled_from([1, 5, 8, 13])),
        ffn=draw(st.sampled_from([1, 4, 7, 11])),
        num_experts=num_experts,
        **draw(extras(num_experts)),
        gated=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        dtype=draw(st.sampled_from(dtypes)),
        capacity=draw(st.none() | st.integers(1, num_tokens)),
        renormalize=draw(st.booleans()),
        tile_m=tile_m_min * draw(st.sampled_from([1, 2, 4])),
        tile_m_min=tile_m_min,
        tile_n=draw(st.sampled_from([2, 3, 4, 9, 64])),
        token_block=draw(st.sampled_from([1, 2, 3, 5, 32])),
    )
    if kinds:
        choices = draw(st.sampled_from([("logits",), ("score",), ("score",), ("given",)]))
        router = draw(router_kinds(num_experts, sizes["num_topk"], choices, num_zero=sizes["num_zero"]))
        expert = draw(expert_kinds())
        sizes |= dict(router=router, renormalize=router.renormalize)
        sizes |= dict(expert=expert, gated=expert.gated, activation=expert.activation)
    config = MoEConfig(**(sizes | fixed))
    return with_norm(draw, config) if norms and draw(st.booleans()) else config


def with_norm(draw, config):
    """Of one column a norm leaves little but eps, and that after a difference of nearly equal numbers."""
    eps = draw(st.sampled_from([1e-5, 0.1])) if config.hidden > 1 else 1.0
    return replace(config, expert=replace(config.expert_kind, norm_eps=eps), shared_expert=config.shared_kind)


def token_counts(config):
    one = st.sampled_from([0, 1, config.num_tokens]) | st.integers(0, config.num_tokens)
    return st.lists(one, min_size=config.num_ranks, max_size=config.num_ranks)


@st.composite
def worlds(draw, max_calls=3, **options):
    """A world whose calls differ in token counts; some route outside, evenly or most tokens to a few experts, some of
    these with choices left out."""
    config = draw(configs(**options))
    weights = Weights.random(config, seed=draw(st.integers(0, 99)), bias=draw(st.booleans()))
    counts = draw(st.lists(token_counts(config), min_size=1, max_size=max_calls))
    seeds = [draw(st.integers(0, 2**32)) for _ in counts]
    given = config.router_kind.choice == "given"
    biases = [draw(st.sampled_from([0.0, 2.0, 50.0] if given else [None, None, 0.0, 2.0, 50.0])) for _ in counts]
    x = [random_tokens(config, count, seed) for count, seed in zip(counts, seeds, strict=True)]
    routings = [
        None if bias is None else random_routing(config, count, seed, bias)
        for count, seed, bias in zip(counts, seeds, biases, strict=True)
    ]
    padded = [draw(st.booleans()) if routing else False for routing in routings]
    routings = [with_no_choices(config, r, s) if p else r for r, s, p in zip(routings, seeds, padded, strict=True)]
    return LayerCalls(config, weights, draw(st.integers(1, 4)), x, routings)


@contextlib.contextmanager
def watched_signals(regions):
    """On fibers: every release of a signal is checked (`Regions.check_signal`) when it is called."""
    packages = ("flashmoe_numba.kernel_interpreted.", "planted_kernel.")
    modules = [m for name, m in sys.modules.items() if name.startswith(packages) and hasattr(m, "st_release")]

    def release(words, i, value):
        regions.check_signal(words, int(i), int(value))
        st_release(words, i, value)

    try:
        for module in modules:
            module.st_release = release
        yield
    finally:
        for module in modules:
            module.st_release = st_release


def run_world(world, make=FlashMoE, **settings):
    """Every call of the world on one layer, each checked; returns (routings, y) of each call."""
    results = []
    with make(world.config, world.weights, num_processors=world.num_processors, **settings) as layer:
        regions = Regions(layer)
        for epoch, (x, routing) in enumerate(world.calls(), start=1):
            regions.poison()
            with watched_signals(regions):
                y = layer(x, **routing)
            routings = layer.routing
            if routing:
                check_given(world.config, routing, routings)
            assert_equals_oracle(y, x, world.weights, world.config, routings, external="topk_weights" in routing)
            regions.check(x, y, routings, epoch)
            check_stats(layer, x, routings, epoch)
            results.append((routings, y))
    return results


def check_given(config, given, routings):
    """The layer says that it used what was given."""
    for rank, used in enumerate(routings):
        idx = given["topk_idx"][rank]
        chosen = (idx >= 0) & (idx < config.num_choices)
        np.testing.assert_array_equal(used.topk_idx, np.where(chosen, idx, -1))
        if "topk_weights" in given:
            factors = np.where(chosen, given["topk_weights"][rank], 0).astype(config.accumulator)
            np.testing.assert_array_equal(used.topk_weights, factors)


def check_stats(layer, x, routings, epoch):
    """The counters agree with a plain count."""
    config, stats = layer.config, layer.stats
    counts = [np.bincount(r.topk_idx[r.topk_idx >= 0], minlength=config.num_choices) for r in routings]
    chosen = [count[: config.num_experts] for count in counts]
    sent = np.array([np.minimum(count, config.slots) for count in chosen])
    per_owner = sent.sum(axis=0).reshape(config.num_ranks, -1).sum(axis=1)
    for rank, s in enumerate(stats):
        got = (s.epoch, s.num_tokens, s.sent_rows, s.dropped_pairs, s.received_rows)
        expected = (epoch, len(x[rank]), sent[rank].sum(), (chosen[rank] - sent[rank]).sum(), per_owner[rank])
        assert got == expected, f"{config}, rank {rank}: {s}"
        shared_tiles = -(-len(x[rank]) // config.tile_m) if config.shared_ffn else 0
        assert (s.zero_choices, s.shared_tiles) == (counts[rank][config.num_experts :].sum(), shared_tiles), f"{s}"
        assert (s.nonfinite_tokens, s.nonfinite_rows) == (0, 0), f"{config}, rank {rank}: {s}"
        assert s.row_tiles == sum(map(len, layer.row_tiles[rank])), f"{config}, rank {rank}: {s}"
        for expert, tiles in enumerate(layer.row_tiles[rank], rank * config.num_experts_per_rank):
            assert tiling_problem(tiles, sent[:, expert].tolist(), config) is None, f"{config}, expert {expert}"
        assert s.received_rows <= s.padded_rows <= s.received_rows + s.row_tiles * (config.tile_m - 1), f"{config}: {s}"
