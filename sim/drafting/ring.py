"""Sums that go round a ring of ranks: each adds its part of a token's result and hands the sum to the rank before it.

Columns are cut into splits, which go one after the other, and each in as many stages as there are ranks. In stage s a
rank adds up its results for the tokens of the rank s + 1 places on, adds what it got for them, and stores the sum in
the memory of the rank before it; in the last one they are its own, and done. So a row of every token crosses every
link, whether the experts of that rank have a part in it or not, and few blocks do it, each a tile at a time.

A block has a few rows at a time. Its threads read what there is to add one after the other, each result of the token
that this rank has and the sum so far, and wait for each; then they store the new sum.

Source: the public code bytedance/flux, src/moe_gather_rs/topk_gather_rs_v2.cu (tiles, threads, stages). Leaves out:
that a tile waits for the same tile of the stage before, and not for all of them.
"""

from __future__ import annotations

import numpy as np

from ..engine.graph import Array
from ..engine.kinds import COMBINE, SEND
from .draft import Draft

TILE_ROWS, TILE_COLUMNS = 128, 1024
ROWS_AT_A_TIME = 6  # 768 threads, each with 8 columns of a row


def ring_sums(comm: Draft, complete: Array, read_ns: int) -> Array:
    """`[num_ranks]`: each rank has the sums of its tokens.

    Args:
        comm: whose slots do it.
        complete: `[num_splits, num_ranks]`, when a split of the results of a rank is there.
        read_ns: until what a thread reads from memory is there.
    """
    world, ranks = comm.world, comm.ranks
    stages, split = world.num_ranks, np.arange(len(complete))[:, None]
    tokens, columns = world.routing.num_tokens, world.config.hidden / len(complete)
    count = -(-tokens // TILE_ROWS) * int(np.ceil(columns / TILE_COLUMNS))
    nbytes = tokens * columns * world.precision.result_bytes / count
    steps = -(-min(tokens, TILE_ROWS) // ROWS_AT_A_TIME)
    store_ns = nbytes / world.hardware.sm_write_gbps
    before: Array | None = None
    for stage in range(stages):
        kind, to = (COMBINE, ranks) if stage == stages - 1 else (SEND, (ranks - 1) % stages)
        reads = 1 + world.traffic[(ranks + stage + 1) % stages, ranks] / max(1, tokens)
        nodes = comm.send(
            kind,
            ranks,
            to,
            nbytes,
            m=split,
            count=count,
            server=comm.machine.sm,
            priority=split * stages + stage,
            duration_ns=np.ceil(steps * reads * read_ns + store_ns),
        )
        comm.builder.edge(complete, nodes)
        if before is not None:
            comm.builder.edge(before, np.roll(nodes, 1, axis=1))
        before = nodes
    assert before is not None
    return comm.gather(before, np.broadcast_to(ranks, before.shape))
