"""Many ranks' blocks in one launch, which find their arguments in a table: how a GPU runs `persistent`.

The table is an array of words: a header, then the arguments of each rank that this launch runs. So a launch has one
argument, whatever the layer's size, and a recorded launch (a CUDA graph) can be replayed: epochs are counted where the
kernel runs, by the last block of a rank to leave.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from flashmoe_numba.device import block_sync, fetch_add, jit, lane, record_at

from .persistent import persistent
from .state import Experts, Problem, Queue, Received, Segments, Tokens

# words of the header
BLOCKS_PER_RANK, WORDS_PER_RANK = 0, 1
HEADER_WORDS = 2


class RankArguments(NamedTuple):
    """What all blocks of a rank are given. `problem` comes first, and its epoch first in it: `leave` counts it up."""

    problem: Problem
    segments: Segments
    experts: Experts
    tokens: Tokens
    received: Received
    queue: Queue
    traces: Any  # int64 [blocks, words of a block's buffer]
    left: Any  # int64 [1]: blocks that have left this epoch


@jit
def grid_block(index, table, like, scratch, box):
    """Run block `index` of the launch; `like` is any value of the record's type."""
    num_blocks = table[BLOCKS_PER_RANK]
    rank, block = index // num_blocks, index % num_blocks
    at = HEADER_WORDS + rank * table[WORDS_PER_RANK]
    r = record_at(table, at, like)
    trace_words = r.traces.size // num_blocks
    trace = r.traces[block * trace_words : (block + 1) * trace_words]
    if trace_words > 0 and lane() == 0:
        trace[0] = 0
    persistent(block, r.problem, r.segments, r.experts, r.tokens, r.received, r.queue, scratch, box, trace)
    block_sync()
    if lane() == 0 and fetch_add(r.left, 0, 1) + 1 == num_blocks:  # nobody needs this epoch's number any more
        r.left[0] = 0
        table[at] += 1
