"""The tile GEMM over `Matrices`, as plain functions over the device vocabulary.

In two steps, for a group of rows at a time: `tile_sums` fills the block's `scratch.sums` with the products of the rows
and all columns of the tile, and the epilogue adds biases, applies the activation, rounds and stores. A target may have
its own way to the sums (hopper.py); `sum_products` is the one that needs nothing but the vocabulary.

The backward's verbs are `derive_tile` and `add_outer_products`, over the same two steps and the same staging.

Every sum is one chain of multiply-adds in the order of the depth index, whatever the row's place or the tile's height.
"""

from .derivatives import derive_tile
from .epilogue import multiply_tile
from .outer_products import add_outer_products
from .products import sum_products

__all__ = ["add_outer_products", "derive_tile", "multiply_tile", "sum_products"]
