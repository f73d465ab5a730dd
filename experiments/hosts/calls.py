"""Calls of a layer with other numbers of tokens each time, made alike by every rank and by who judges them.

Every third one is followed by its backward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe_numba import FlashMoE
from reference import MoEConfig, Weights

DIGEST_BYTES = 16
SEED = 11
BACKWARD_EVERY = 3
SMALL_SHARE = 24  # of calls of small layers, for one of a large layer


@dataclass(frozen=True, kw_only=True)
class Work:
    """A layer, which every rank makes alike.

    Args:
        num_tokens: of a rank in a call, at most.
    """

    num_ranks: int
    num_tokens: int = 24
    hidden: int = 64
    ffn: int = 96
    dtype: str = "float32"
    save: str = "rows+up"

    @property
    def config(self) -> MoEConfig:
        sizes = dict(num_tokens=self.num_tokens, hidden=self.hidden, ffn=self.ffn, num_topk=2, gated=True)
        experts = dict(num_ranks=self.num_ranks, num_experts=2 * self.num_ranks, activation="silu")
        return MoEConfig(**sizes, **experts, dtype=self.dtype)

    @property
    def call_kib(self) -> int:
        """As much as a call brings to a rank: its choices' results, and as many rows for its experts."""
        config = self.config
        return 2 * config.num_tokens * config.num_topk * config.hidden * config.numpy_dtype.itemsize // 1024

    def make(self, **where: Any) -> FlashMoE:
        """The layer; `where` its ranks are."""
        config = self.config
        return FlashMoE(config, Weights.random(config, seed=SEED), num_processors=1, save=self.save, **where)

    def tokens(self, call: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(x, dy) of each rank; no tokens on every fifth or so."""
        rng = np.random.default_rng([SEED, call])
        counts = rng.integers(-self.num_tokens // 4, self.num_tokens + 1, self.num_ranks).clip(0)
        dtype = self.config.numpy_dtype
        x, dy = ([rng.standard_normal((count, self.hidden)).astype(dtype) for count in counts] for _ in range(2))
        return x, dy


def one_call(layer: FlashMoE, work: Work, call: int, rank_idx: int | None = None) -> list[bytes]:
    """Digests of what a call has given, and its backward if it has one: to this rank, or to each (None)."""
    x, dy = work.tokens(call) if rank_idx is None else (part[rank_idx] for part in work.tokens(call))
    if call % BACKWARD_EVERY:
        parts = [layer(x)]
    else:
        y, saved = layer.forward(x)
        gradients = layer.backward(saved, dy)
        parts = [y, gradients.x, gradients.topk_weights, gradients.logits, gradients.weights]
    if rank_idx is not None:
        return [digest(*parts)]
    return [digest(*of_rank) for of_rank in zip(*parts, strict=True)]


def digest(*parts: Any) -> bytes:
    """Of arrays, and of the arrays that weights have."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        arrays = [part] if isinstance(part, np.ndarray) else [vars(part)[name] for name in sorted(vars(part))]
        for array in arrays:
            if isinstance(array, np.ndarray):
                found.update(array.tobytes())
    return found.digest()


def expected(work: Work, first: int = 0) -> Iterator[list[bytes]]:
    """Digests of all ranks' results, call after call, from one process."""
    call = first
    with work.make() as layer:
        while True:
            yield one_call(layer, work, call)
            call += 1


def soak_works(num_ranks: int) -> list[tuple[Work, int]]:
    """Layers of every element type and `save`, and one whose packets have several megabytes, with shares of calls."""
    saves = {"float64": "rows", "float32": "rows+up", "float16": "nothing", "bfloat16": "rows+up"}
    small = [(Work(num_ranks=num_ranks, dtype=dtype, save=save), SMALL_SHARE) for dtype, save in saves.items()]
    return [*small, (Work(num_ranks=num_ranks, num_tokens=150 * num_ranks, hidden=2056, ffn=24), 1)]


def soak_layers(num_ranks: int, rounds: int, calls: int) -> Iterator[list[tuple[Work, range]]]:
    """Each round's layers, one after the other, and their calls, of which there are `calls` or a few more in all."""
    works, first = soak_works(num_ranks), 0
    share = -(-calls // (rounds * sum(share for _, share in works)))
    for _ in range(rounds):
        layers = []
        for work, shares in works:
            layers.append((work, range(first, first + share * shares)))
            first += share * shares
        yield layers
