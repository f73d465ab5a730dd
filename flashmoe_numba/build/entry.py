"""The kernel's entry on a GPU: it finds its shared memory and its table, and runs one block of the grid.

A type describes what the records of the table hold; numbers and addresses come at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..device import array_at
from ..device.cuda import co_resident, undefined
from ..device.cuda_api import cuda, types
from ..kernel.backward.grid import grid_block_backward
from ..kernel.grid import grid_block
from ..kernel.state import BOX_WORDS
from ..tile_gemm import Scratch
from ..tile_gemm import cuda as _registers_the_tile_gemm  # noqa: F401
from ..tile_gemm.hopper import SHARED_ALIGNMENT
from ..tile_gemm.matrices import SUMS_ELEMENTS
from .likeness import forward_of, like_arguments
from .variants import Variant

ROWS_AT = SUMS_ELEMENTS  # in the block's shared memory, elements: behind the sums that lanes make


def make_entry(variant: Variant) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """(kernel, signature): the kernel takes the table's address and its number of words."""
    record_type, accumulator = record_types(variant)
    like, run_block = undefined(record_type), grid_block_backward if variant.backward else grid_block

    def flashmoe(table_address, num_words):
        co_resident()
        box = cuda.shared.array(BOX_WORDS, types.int64)
        shared = cuda.shared.array(0, accumulator, alignment=SHARED_ALIGNMENT)
        table = array_at(table_address, num_words, box)
        run_block(cuda.blockIdx.x, table, like(), Scratch(shared[ROWS_AT:], shared), box)

    return flashmoe, (types.int64, types.int64)


def record_types(variant: Variant) -> tuple[Any, Any]:
    """Numba's types of a rank's arguments and of a sum."""
    from numba import typeof

    record = like_arguments(variant)
    return typeof(record), typeof(forward_of(record).tokens.logits).dtype
