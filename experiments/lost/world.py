"""A layer, the calls that all ranks make of it, and the results that nobody disturbed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe_numba import FlashMoE
from flashmoe_numba.layer.saved import SavedCall
from reference import MoEConfig, Weights

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Calls go round `tokens`, `[calls][rank] -> [num_tokens, hidden]`; `expected` are the results, likewise.

    Where `save` is one, every other call is the backward of the one before it, whose tokens are gradients.
    """

    config: MoEConfig
    weights: Weights
    tokens: list[list[Array]]
    expected: list[list[bytes]]
    save: str | None
    num_calls: int
    num_processors: int
    deadline_s: float


def make_trial(
    num_ranks: int, num_calls: int, deadline_s: float, num_processors: int = 2, save: str | None = None
) -> Trial:
    """Compiles the kernel, if that was not done, so that forked ranks need not."""
    config = MoEConfig(
        num_ranks=num_ranks, num_tokens=64, hidden=64, ffn=128, num_experts=2 * num_ranks, num_topk=2, gated=True,
        activation="silu", tile_m=16, tile_m_min=4, tile_n=32, token_block=16,
    )  # fmt: skip
    weights, rng = Weights.random(config, seed=num_ranks, bias=True), np.random.default_rng(num_ranks)
    full, ragged = [config.num_tokens] * num_ranks, rng.integers(0, config.num_tokens, num_ranks)
    turns = [full, ragged, [0] * (num_ranks - 1) + [40], full]
    tokens = [_tokens(config, counts, rng) for counts in turns for _ in range(1 if save is None else 2)]
    expected, saved = [], None
    with FlashMoE(config, weights, num_processors=num_processors, save=save) as layer:
        for parts in tokens:
            found, saved = make_call(layer, parts, saved, save)
            expected.append(found)
    return Trial(
        config=config, weights=weights, tokens=tokens, expected=expected, save=save, num_calls=num_calls,
        num_processors=num_processors, deadline_s=deadline_s,
    )  # fmt: skip


def make_call(layer: FlashMoE, tokens: Any, saved: SavedCall | None, save: str | None) -> tuple[list[bytes], Any]:
    """(of each rank here the bytes of all it has of the next call, what it kept): the backward of `saved`, if any."""
    fields, kept = [], None
    if saved is not None:
        found = layer.backward(saved, tokens)
        fields = [found.x, found.topk_weights, found.logits, found.weights]
    elif save is not None:
        y, kept = layer.forward(tokens)
        fields = [y]
    else:
        fields = [layer(tokens)]
    of_ranks = zip(*fields, strict=True) if isinstance(tokens, list) else [fields]
    return [b"".join(map(_bytes_of, parts)) for parts in of_ranks], kept


def _bytes_of(part: Array | Weights) -> bytes:
    arrays = vars(part).values() if isinstance(part, Weights) else [part]
    return b"".join(array.tobytes() for array in arrays if isinstance(array, np.ndarray))


def _tokens(config: MoEConfig, counts: Any, rng: np.random.Generator) -> list[Array]:
    return [rng.standard_normal((count, config.hidden)).astype(config.numpy_dtype) for count in counts]
