"""The persistent kernel's entry: one launch per rank and call, all blocks alike until they learn their role."""

from __future__ import annotations

from flashmoe_numba.device import jit

from .processor import processor
from .state import RankState
from .subscriber import os_block


@jit(entry=True)
def persistent(block, p, segments, experts, tokens, received, queue, scratch, box, trace):
    """Run block `block` of this rank: blocks [0, num_processors) are processors, the last is the OS block.

    `scratch` and `box` belong to the block: working memory of the tile GEMM, and words that its lanes share. `trace` is
    the block's record buffer, of size 0 when nothing is to be recorded.
    """
    rank = RankState(p, segments, experts, tokens, received, queue)
    if block == p.num_processors:
        os_block(block, rank, trace)
    else:
        processor(block, rank, scratch, box, trace)
