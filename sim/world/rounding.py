"""Token rounding: each expert's rows become a multiple of the row tile, so that no tile is padded.

A routing is changed, not a schedule: any policy can run the result. An expert drops rows, or takes tokens that had not
chosen it, by less than one tile of them; its rows are counted over all ranks, so policies that pack the rows of an
expert over their sources lose all padding, and those with tiles per source only some.

Source: SonicMoE (arXiv 2512.14080), whose router drops the rows of the lowest scores and adds the tokens of the best
next ones. A `SimRouting` has no scores, so here both are drawn at random: the counts are the same, the tokens are not.
Leaves out: rounding by the sum of scores, and how the loss of rows changes the model.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from reference.arrays import Array, stream
from reference.scalars import check_one_of, is_whole, plain

from . import streams
from .routing import SimRouting

WAYS = ("nearest", "up", "down")


def round_tokens(routing: SimRouting, tile_m: int, how: str = "nearest", seed: int = 0) -> SimRouting:
    """The routing with each expert's rows rounded to a multiple of `tile_m`.

    Choices keep their places. A dropped one is -1; one that is added stands behind the token's own, so `topk_idx`
    `[num_ranks, num_tokens, num_topk]` may become wider, with -1 for tokens that no more experts took.

    Args:
        how: "nearest" (half a tile goes up), "up" or "down". An expert for which there are not enough tokens goes down.
            Tokens without any choice are taken to be absent, and nobody takes them.

    Raises:
        TypeError, ValueError: naming the argument, its value and the rule.
    """
    tile_m = plain(tile_m)
    if not is_whole(tile_m) or tile_m < 1:
        raise ValueError(f"tile_m must be an integer >= 1, got {tile_m!r}")
    check_one_of("how", how, WAYS)
    random = stream(seed, streams.ROUNDING)
    choices = routing.topk_idx.reshape(-1, routing.num_topk).copy()  # tokens of all ranks
    present = choices.max(axis=1) >= 0
    change = _change(routing.counts.sum(axis=0), tile_m, how, int(present.sum()))
    added = _change_choices(choices, present, change, random)
    wider = _append(choices, *added).reshape(routing.num_ranks, routing.num_tokens, -1)
    return replace(
        routing,
        name=f"{routing.name}, rounded ({how}) to {tile_m}",
        topk_idx=wider,
        dropped=routing.dropped - int(change[change < 0].sum()),
        added=routing.added + len(added[0]),
    )


def _change(total: Array, tile_m: int, how: str, num_present: int) -> Array:
    """`[num_experts]`, rows that each expert gains; negative where it loses some."""
    down = total // tile_m * tile_m
    extra = {"nearest": tile_m // 2, "up": tile_m - 1, "down": 0}[how]
    rounded = (total + extra) // tile_m * tile_m
    change: Array = np.where(rounded > num_present, down, rounded) - total
    return change


def _change_choices(choices: Array, present: Array, change: Array, random: np.random.Generator) -> tuple[Array, Array]:
    """Drop choices in place; returns the tokens and the experts of those to add."""
    flat = choices.ravel()
    by_expert = np.argsort(flat, kind="stable")
    start = np.searchsorted(flat[by_expert], np.arange(len(change) + 1))
    tokens, experts = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for expert in np.flatnonzero(change).tolist():
        own = by_expert[start[expert] : start[expert + 1]]
        if change[expert] < 0:
            flat[random.choice(own, -change[expert], replace=False)] = -1
            continue
        free = present.copy()
        free[own // choices.shape[1]] = False
        tokens.append(random.choice(np.flatnonzero(free), change[expert], replace=False))
        experts.append(np.full(change[expert], expert, np.int32))
    return np.concatenate(tokens), np.concatenate(experts)


def _append(choices: Array, token: Array, expert: Array) -> Array:
    """`choices` with these (token, expert) behind them."""
    order = np.argsort(token, kind="stable")
    token, expert = token[order], expert[order]
    column = np.arange(len(token)) - np.searchsorted(token, token)
    extra = np.full((len(choices), int(column.max(initial=-1)) + 1), -1, np.int32)
    extra[token, column] = expert
    return np.concatenate([choices, extra], axis=1)
