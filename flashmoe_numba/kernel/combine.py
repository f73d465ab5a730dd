"""Combine: results back into token order, summed in the order of a token's choices, then the shared expert's."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flashmoe_numba.device import (
    add_part,
    block_sync,
    copy_row,
    fetch_add,
    jit,
    lane,
    lanes,
    load,
    part_columns,
    scale_part,
    store_part,
    zero_sums,
)
from reference.task_kinds import COMBINE

from .queue import QueueTask, push


@jit
def need(p, tokens, queue, token_block, more):
    """A token block needs so many more results, or fewer; whoever finds that it needs no more queues its COMBINE.

    Counts come in any order: it is below zero while shared row tiles are done and the gate has not said what there is.
    """
    if fetch_add(tokens.needs_left, token_block, more) + more == 0:
        push(p, queue, QueueTask(COMBINE, 0, 0, token_block, 0))


class Choices(NamedTuple):
    """Those of a token block's pairs, named once before all loops: a GPU loads a field wherever it is named."""

    topk_idx: np.ndarray
    topk_weights: np.ndarray
    bases: np.ndarray
    place: np.ndarray
    block_at: int  # where the block begins in `bases`
    num_experts: int
    slots: int


@jit
def choices_of(p, tokens, token_block):
    block_at = token_block * p.num_experts
    return Choices(tokens.topk_idx, tokens.topk_weights, tokens.bases, tokens.place, block_at, p.num_experts, p.slots)


@jit
def result_row(choices, pair):
    """Row of a pair's result, or -1: it was dropped, chose no expert that computes, or has a weight of 0.

    Where it has none there may be no result, or an old one; and 0 times an infinity is NaN.
    """
    e = choices.topk_idx[pair]
    if choices.topk_weights[pair] == 0 or e < 0 or e >= choices.num_experts:
        return -1
    slot = choices.bases[choices.block_at + e] + choices.place[pair]
    return e * choices.slots + slot if slot < choices.slots else -1


@jit
def chose_zero(choices, pair):
    """Did the pair choose a zero-computation expert, with a weight?"""
    return choices.topk_weights[pair] != 0 and choices.topk_idx[pair] >= choices.num_experts


@jit
def combine(p, tokens, segments, norm, scratch, token_block):
    """y = sum of factor * result over a token's choices, in that order. A lane sums a part of a row at a time.

    A factor is the weight, or what `make_factors` made of it. The result of a zero-computation expert is the token
    itself, or nothing; the shared expert's comes last.
    """
    choices = choices_of(p, tokens, token_block)  # this and what follows before the loops, see `Choices`
    hidden, num_topk, adds_input, shares, x = p.hidden, p.num_topk, p.adds_input, p.shared_ffn > 0, tokens.x
    shared_results, shared_factors = tokens.shared_results, tokens.shared_factors
    y, result, working, weights = tokens.y, segments.result, scratch.sums, tokens.topk_weights
    first = token_block * p.token_block
    rows = min(p.token_block, p.num_tokens - first)
    factors, scale, has_norm = weights, norm.scale, norm.scale.size > 0
    if tokens.factors.size > 0:
        factors = tokens.factors
        make_factors(p, tokens, result, norm, choices, first * num_topk, rows * num_topk)
        block_sync()
    if tokens.kept_results.size > 0:
        keep_results(p, tokens, result, choices, first * num_topk, rows * num_topk)
    width = part_columns(y, result, hidden)
    if adds_input:
        width = min(width, part_columns(y, x, hidden))
    parts = (hidden + width - 1) // width
    for i in range(lane(), rows * parts, lanes()):
        token, column = first + i // parts, i % parts * width
        columns = min(width, hidden - column)
        sums = zero_sums(working, columns)
        for j in range(num_topk):
            pair = token * num_topk + j
            row = result_row(choices, pair)
            if row >= 0:
                add_part(sums, columns, result, row * hidden + column, factors[pair])
            elif adds_input and not has_norm and chose_zero(choices, pair):
                add_part(sums, columns, x, token * hidden + column, weights[pair])
        if has_norm:
            scale_part(sums, columns, scale, column)
        if has_norm and adds_input:  # what is no result has no scale
            for pair in range(token * num_topk, (token + 1) * num_topk):
                if chose_zero(choices, pair):
                    add_part(sums, columns, x, token * hidden + column, weights[pair])
        if shares and shared_factors[token] != 0:
            add_part(sums, columns, shared_results, token * hidden + column, shared_factors[token])
        store_part(y, token * hidden + column, sums, columns)


@jit
def keep_results(p, tokens, result, choices, first, num_pairs):
    """For a backward through their norm: results are at home now, and the next call's come to the same place."""
    for pair in range(first, first + num_pairs):
        row = result_row(choices, pair)
        if row >= 0:
            copy_row(tokens.kept_results, pair * p.hidden, result, row * p.hidden, p.hidden)


@jit
def make_factors(p, tokens, result, norm, choices, first, num_pairs):
    """Factors of results, a lane for a pair: the weight, or 1 where that was applied before; divided by the norm."""
    for pair in range(first + lane(), first + num_pairs, lanes()):
        weight, row = tokens.topk_weights[pair], result_row(choices, pair)
        if row >= 0:
            factor = weight / weight if p.weight_input else weight
            if norm.scale.size > 0:
                factor = factor / row_norm(p, result, row * p.hidden, norm)
            tokens.factors[pair] = factor


@jit
def row_norm(p, result, at, norm):
    """sqrt(mean(v^2) + eps) of v = scale * result, summed in the order of columns."""
    total = norm.eps - norm.eps
    for c in range(p.hidden):
        value = norm.scale[c] * load(result, at + c)
        total += value * value
    return math.sqrt(total / norm.columns + norm.eps)
