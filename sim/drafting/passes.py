"""What a forward and a backward multiply, and what their tiles move in memory beside the operands of their products.

A backward's first product is that of dy rows and the down matrices, which gives the gradients of hidden rows; its
second that of these gradients, by way of the activation, and the up matrices, which gives rows of dx. The gradients of
weights come on top (`backward.py`). What a forward keeps of a row for its backward, one of `reference.layout.SAVES`:

    rows+up   the row as it came, and its products with the up matrices
    rows      the row; a backward makes the products again
    nothing   no more than what its source has, which sends the row once more
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reference.layout import SAVES

from ..engine.kinds import GEMM0, GEMM1, SHARED0, SHARED1
from ..world.world import World

UP, ROWS, NOTHING = SAVES


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Args:
    shapes: columns and depth of each kind of product.
    moved: bytes of a row that the tiles of a product write and read in memory, all column tiles together.
    activation: bytes that an activation in a kernel of its own reads and writes for each hidden column.
    copies: rows that are dispatched for each choice.
    """

    shapes: Mapping[int, tuple[int, int]]
    activation: float
    moved: Mapping[int, float] = field(default_factory=dict)
    copies: int = 1


def forward_pass(world: World, save: str | None = None) -> Pass:
    """A forward that keeps `save` for its backward; None: nothing is moved for that."""
    config, precision, ups = world.config, world.precision, world.config.expert_kind.num_ups
    row = 2 * config.hidden * precision.token_bytes  # read and written
    kept = {UP: row + world.up_columns * precision.result_bytes, ROWS: row}
    return Pass(
        shapes={
            GEMM0: (world.up_columns, config.hidden),
            GEMM1: (config.hidden, config.ffn),
            SHARED0: (config.shared_ffn * ups, config.hidden),
            SHARED1: (config.hidden, config.shared_ffn),
        },
        activation=ups * precision.result_bytes + precision.hidden_bytes,
        moved={GEMM0: kept[save]} if save in kept else {},
    )


def backward_pass(world: World, save: str = UP, *, in_tiles: bool = True) -> Pass:
    """A backward of a forward that kept `save`.

    Args:
        in_tiles: the tiles of the first product do what comes between the products: read the products with the up
            matrices, write their gradients and the hidden rows, and keep rows for the gradients of weights. If not,
            kernels of their own do.
    """
    config, size = world.config, world.precision.token_bytes  # all formats are one, see `World`
    ups = config.expert_kind.num_ups
    again = 0 if save == UP else ups  # products with the up matrices that are made again
    rows = 2 if save == NOTHING else 1  # dy, and maybe the row itself
    between = (2 * ups + 1) * config.ffn + again * config.ffn + 2 * rows * config.hidden
    return Pass(
        shapes={
            GEMM0: ((1 + again) * config.ffn, config.hidden),
            GEMM1: (config.hidden, world.up_columns),
            SHARED0: ((1 + again) * config.shared_ffn, config.hidden),
            SHARED1: (config.hidden, config.shared_ffn * ups),
        },
        activation=(2 * ups + 2) * size,  # ups and gradients of hidden rows in, gradients of ups and hidden rows out
        moved={GEMM0: between * size} if in_tiles else {},
        copies=rows,
    )
