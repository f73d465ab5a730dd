"""Calls of one layer with other numbers of tokens each time, made alike by every rank and by who judges them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from flashmoe_numba import FlashMoE
from reference import MoEConfig, Weights

DIGEST_BYTES = 16
SEED = 11


def make_config(num_ranks: int, num_tokens: int) -> MoEConfig:
    sizes = dict(hidden=64, ffn=96, num_experts=2 * num_ranks, num_topk=2, gated=True, activation="silu")
    return MoEConfig(num_ranks=num_ranks, num_tokens=num_tokens, **sizes)


def make_weights(config: MoEConfig) -> Weights:
    return Weights.random(config, seed=SEED)


def tokens_of(config: MoEConfig, call: int) -> list[np.ndarray]:
    """Of each rank; none on every fifth or so."""
    rng = np.random.default_rng([SEED, call])
    counts = rng.integers(-config.num_tokens // 4, config.num_tokens + 1, config.num_ranks).clip(0)
    return [rng.standard_normal((count, config.hidden)).astype(np.float32) for count in counts]


def digest(y: np.ndarray) -> bytes:
    return hashlib.blake2b(y.tobytes(), digest_size=DIGEST_BYTES).digest()


def expected(num_ranks: int, num_tokens: int) -> Iterator[list[bytes]]:
    """Digests of all ranks' results, call after call, from one process."""
    config = make_config(num_ranks, num_tokens)
    with FlashMoE(config, make_weights(config), num_processors=1) as layer:
        call = 0
        while True:
            yield [digest(y) for y in layer(tokens_of(config, call))]
            call += 1
