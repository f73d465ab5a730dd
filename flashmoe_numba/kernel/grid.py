"""Many ranks' blocks in one launch, which find their arguments in a table: how a GPU runs an entry of the kernel.

The table is an array of words: a header, then the arguments of each rank that this launch runs. So a launch has one
argument, whatever the layer's size, and a recorded launch (a CUDA graph) can be replayed: epochs are counted where the
kernel runs, by the last block of a rank to leave. Forwards and backwards of a layer share a table, and so its epochs.
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
    """Run block `index` of a forward's launch; `like` is any value of the type `RankArguments`."""
    at, block = find_record(index, table)
    r = record_at(table, at, like)
    trace = begin_trace(r.traces, table, block)
    persistent(block, r.problem, r.segments, r.experts, r.tokens, r.received, r.queue, scratch, box, trace)
    leave_epoch(table, at, r.left)


@jit
def find_record(index, table):
    """(where the arguments of this block's rank begin, which of the rank's blocks it is)."""
    num_blocks = table[BLOCKS_PER_RANK]
    return HEADER_WORDS + index // num_blocks * table[WORDS_PER_RANK], index % num_blocks


@jit(inline=True)
def begin_trace(traces, table, block):
    """The block's own buffer, cleared."""
    words = traces.size // table[BLOCKS_PER_RANK]
    trace = traces[block * words : (block + 1) * words]
    if words > 0 and lane() == 0:
        trace[0] = 0
    return trace


@jit
def leave_epoch(table, at, left):
    """The rank's last block to leave counts up its epoch: nobody needs this one's number any more."""
    block_sync()
    if lane() == 0 and fetch_add(left, 0, 1) + 1 == table[BLOCKS_PER_RANK]:
        left[0] = 0
        table[at] += 1
