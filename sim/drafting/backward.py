"""What backwards are drafted with, beside what forwards are: gradients of weights, the router's, and sums over ranks.

The gradient of a matrix `[rows, columns]` is a sum over all rows that were multiplied by it, in tiles of that matrix;
`m` of a node is 0 for the up matrices, side by side, and 1 for the down matrix. A tile reads both operands, as long as
there are rows, and adds to the sums that are there, or writes them: these bytes share the memory with the operands.

All ranks have the router and the shared expert: their gradients are summed over the ranks, by a reduce-scatter and an
all-gather, in which every rank sends every other its part of the sums. Leaves out: the additions, an overlap with what
other layers do meanwhile, and gradients of biases and norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..engine.graph import Array
from ..engine.kinds import ELEMENTWISE, GEMM0, GEMM1, ROUTER_WEIGHTS, SHARED1, SHARED_WEIGHTS, WEIGHTS
from .blocks import Blocks
from .draft import Draft
from .rank_draft import SPLIT_DEPTH
from .shared import Begin, shared_kernels

SUM_BYTES = 4  # of an accumulator
UP, DOWN = MATRICES = range(2)


class GradientTile(NamedTuple):
    """A tile of a gradient, and how its sums leave: `nbytes` of each element are read and written."""

    rows: int
    columns: int
    nbytes: float = 2 * SUM_BYTES


def _shapes(draft: Draft, second: int) -> tuple[tuple[int, int], ...]:
    """Rows and columns of an expert's matrices, up and down, by the kind of its second product in a backward."""
    hidden, ups = draft.product_shape(second)
    return (ups, hidden), (hidden, ups // draft.world.config.expert_kind.num_ups)


def expert_gradients(draft: Draft, tile: GradientTile, matrices: Sequence[int] = MATRICES) -> tuple[Array, Array]:
    """`[matrices, experts]`: gradients of the matrices of experts that have rows; and `[experts]`, which these are.

    They share a GPU with each other: a kernel for each is asked for alone.
    """
    routing = draft.world.routing
    rows = routing.counts.sum(axis=0)
    expert = np.flatnonzero(rows)
    owner = routing.owner[expert]
    shapes = _shapes(draft, GEMM1)
    each = sum(_tiles(shapes[matrix], tile) for matrix in matrices)
    on_gpu = np.bincount(owner, minlength=draft.world.num_ranks) * each
    nodes = [
        _gradient(draft, WEIGHTS, owner, shapes[m], rows[expert], tile, on_gpu[owner], m=m, expert=draft.local[expert])
        for m in matrices
    ]
    return np.stack(nodes), expert


def shared_gradients(draft: Draft, tile: GradientTile, matrices: Sequence[int] = MATRICES) -> Array:
    """`[matrices, num_ranks]`: those of the shared expert."""
    shapes, tokens = _shapes(draft, SHARED1), draft.world.routing.num_tokens
    each = sum(_tiles(shapes[matrix], tile) for matrix in matrices)
    one = partial(_gradient, draft, SHARED_WEIGHTS, draft.ranks)
    return np.stack([one(shapes[m], tokens, tile, each, m=m) for m in matrices])


def router_gradients(draft: Draft, tile: GradientTile, split: bool = True) -> Array:
    """`[num_ranks]`: those of the router: gradients of logits times tokens.

    Args:
        split: few tiles are cut by tokens, too, as libraries do, so that all slots have some.
    """
    config = draft.world.config
    shape = config.num_choices, config.hidden
    number = _tiles(shape, tile)
    parts = min(max(1, draft.cost.slots // number), -(-config.num_tokens // SPLIT_DEPTH)) if split else 1
    return _gradient(
        draft, ROUTER_WEIGHTS, draft.ranks, shape, config.num_tokens, tile, number * parts, parts=parts
    )  # fmt: skip


def _tiles(shape: tuple[int, int], tile: GradientTile) -> int:
    return -(-shape[0] // tile.rows) * -(-shape[1] // tile.columns)


def _gradient(
    draft: Draft,
    kind: int,
    rank: Array,
    shape: tuple[int, int],
    depth: ArrayLike,
    tile: GradientTile,
    on_gpu: ArrayLike,
    parts: int = 1,
    **names: ArrayLike,
) -> Array:
    """`[len(rank)]`: the gradient of a matrix of this shape, a sum over `depth` rows in so many parts.

    Both operands are rows, whose format is that of the weights.
    """
    tile = tile._replace(rows=min(tile.rows, shape[0]), columns=min(tile.columns, shape[1]))
    number, each = _tiles(shape, tile) * parts, np.asarray(depth) / parts
    high, wide = -(-shape[0] // tile.rows), -(-shape[1] // tile.columns)
    reuse = draft.cost.reuse(high, shape[1], each, tile.columns)
    real, read = shape[0] / high, shape[1] / wide
    timed = draft.cost.node_of_tile(
        tile.rows, tile.columns, each, on_gpu, reuse, read, real, moved=real * read * tile.nbytes
    )
    return draft.builder.add(
        kind,
        rank,
        count=number,
        server=draft.machine.sm[rank],
        **timed,
        flops=2.0 * tile.rows * tile.columns * each,
        useful_flops=2.0 * shape[0] * shape[1] / number * np.asarray(depth),
        **names,
    )


# ---- kernels


def backward_kernels(
    draft: Draft, after: ArrayLike, blocks: Blocks, tile: GradientTile, begin: Begin | None = None
) -> Array:
    """`[num_ranks]`: five kernels, one after the other, as the layers of a framework are run backwards.

    Gradients of hidden rows, of the down matrices, of the activation; rows of dx, and gradients of the up matrices.
    Products have tiles like gradients; where blocks are lower, their widths are tuned as a forward's are (`Draft.ffn`).
    """
    begun, world = begin or draft.begin, draft.world
    owner = world.routing.owner[blocks.expert]
    first, second = (draft.tuned_width(kind, blocks, tile.rows, tile.columns) for kind in (GEMM0, GEMM1))
    hidden = draft.kernel(begun(after), draft.gemm(GEMM0, blocks, first), owner)
    summed = gradient_kernel(draft, begun(hidden), tile, (DOWN,))
    active = draft.stream(begun(summed), world.rows * world.config.ffn * draft.now.activation / 2, ELEMENTWISE)
    results = draft.kernel(begun(active), draft.gemm(GEMM1, blocks, second), owner)
    return gradient_kernel(draft, begun(results), tile, (UP,))


def gradient_kernel(draft: Draft, begun: Array, tile: GradientTile, matrices: Sequence[int] = MATRICES) -> Array:
    """`[num_ranks]`: a kernel for gradients of experts' matrices is complete."""
    nodes, expert = expert_gradients(draft, tile, matrices)
    owner = np.broadcast_to(draft.world.routing.owner[expert], nodes.shape)
    return draft.kernel(begun, nodes.ravel(), owner.ravel())


def dense_kernels(
    draft: Draft,
    after: Array,
    row_tile: tuple[int, int],
    tile: GradientTile,
    begin: Begin | None = None,
    *,
    router: bool = True,
) -> Array:
    """`[num_ranks]`: kernels for the shared expert, if there is one, and for the `router` are complete.

    The router's product for dx has as many operations as that of a forward, and is taken to be as long.
    """
    begun = begin or draft.begin
    if draft.world.config.shared_ffn:
        after = shared_kernels(draft, after, row_tile, begin)
        for matrix in MATRICES:
            nodes = shared_gradients(draft, tile, (matrix,))
            after = draft.kernel(begun(after), nodes.ravel(), draft.ranks)
    if not router:
        return after
    routed = draft.gate(begun(after))
    return draft.kernel(begun(routed), router_gradients(draft, tile), draft.ranks)


# ---- ranks


def dense_gradient_bytes(draft: Draft) -> int:
    """Of the router's and the shared expert's gradients."""
    config = draft.world.config
    columns = config.num_choices + config.shared_ffn * config.expert_kind.num_matrices
    return config.hidden * columns * SUM_BYTES


def reduce_gradients(draft: Draft, after: Array, begin: Begin | None = None) -> Array:
    """`[num_ranks]`: every rank has the sums of what all ranks have; nothing is done where there is one rank."""
    ranks = draft.world.num_ranks
    if ranks == 1:
        return after
    begun = begin or draft.begin
    part = np.full((ranks, ranks), -(-dense_gradient_bytes(draft) // ranks))
    for _ in ("reduce-scatter", "all-gather"):
        after = draft.collective(begun(after), part)
    return after
