"""The persistent kernel's entry: one launch per rank and call, all blocks alike until they learn their role."""

from __future__ import annotations

from flashmoe_numba.device import jit

from .processor import processor
from .subscriber import os_block


@jit(entry=True)
def persistent(block, p, segments, experts, tokens, received, queue, scratch, box, trace):
    """Run block `block` of this rank: blocks [0, num_processors) are processors, the last is the OS block.

    `scratch` and `box` belong to the block: working memory of the tile GEMM, and words that its lanes share. `trace` is
    the block's record buffer, of size 0 when nothing is to be recorded.
    """
    if block == p.num_processors:
        os_block(p, block, segments, tokens, received, queue, trace)
    else:
        processor(p, block, segments, experts, tokens, received, queue, scratch, box, trace)
