"""The kernel's entry on a GPU: it finds its shared memory and its table, and runs one block of the grid.

A type describes what the records of the table hold; numbers and addresses come at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from reference import MoEConfig, Weights

from ..backends.host import HostMemory
from ..device import array_at
from ..device.cuda import co_resident, undefined
from ..device.cuda_api import cuda, types
from ..kernel.grid import Record, grid_block
from ..kernel.state import BOX_WORDS
from ..rank import Rank
from ..tile_gemm import Scratch, as_matrices
from ..tile_gemm import cuda as _registers_the_tile_gemm  # noqa: F401
from ..tile_gemm.hopper import MAP_WORDS, NUM_MAPS, SHARED_ALIGNMENT, tma_matrices
from ..tile_gemm.matrices import PASS_ROWS, SUMS_STRIDE
from .variants import Variant

ROWS_AT = PASS_ROWS * SUMS_STRIDE  # in the block's shared memory, elements: behind the sums that lanes make


def make_entry(variant: Variant) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """(kernel, signature): the kernel takes the table's address and its number of words."""
    record_type, accumulator = record_types(variant)
    like = undefined(record_type)

    def flashmoe(table_address, num_words):
        co_resident()
        box = cuda.shared.array(BOX_WORDS, types.int64)
        shared = cuda.shared.array(0, accumulator, alignment=SHARED_ALIGNMENT)
        table = array_at(table_address, num_words, box)
        grid_block(cuda.blockIdx.x, table, like(), Scratch(shared[ROWS_AT:], shared), box)

    return flashmoe, (types.int64, types.int64)


def record_types(variant: Variant) -> tuple[Any, Any]:
    """Numba's types of a Record and of sums, read off a tiny layer in this process's memory."""
    from numba import typeof

    sizes = dict(num_ranks=1, num_tokens=1, hidden=8, ffn=8, num_experts=1, num_topk=1)
    config = MoEConfig(**sizes, dtype=variant.dtype)
    segment = np.zeros(4096, np.uint8)
    rank = Rank(config, 0, Weights.random(config), [segment], 1, _Types(variant), 0)
    record = make_record(rank, rank.tokens, rank.problem, np.zeros(1, np.int64))
    return typeof(record), typeof(np.empty(0, config.accumulator)).dtype


def make_record(rank: Rank, tokens: Any, problem: Any, left: Any) -> Record:
    """What a rank's blocks are given."""
    return Record(problem, rank.segments, rank.experts, tokens, rank.packets, rank.queue, rank.all_traces, left)


class _Types(HostMemory):
    """A backend for `Rank` of which only the types matter."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant

    def make_scratch(self, config: MoEConfig) -> None:
        """It is shared memory, which the entry makes."""

    def pack(
        self,
        matrices: Sequence[np.ndarray],
        biases: Sequence[np.ndarray | None],
        tile_n: int,
        accumulator: np.dtype,
        rows: np.ndarray | None,
    ) -> Any:
        packed = as_matrices(matrices, biases, tile_n, accumulator, np.ascontiguousarray)
        if rows is None or not self._variant.tensor_cores:
            return packed
        return tma_matrices(packed, np.zeros(NUM_MAPS * MAP_WORDS, np.int64))
