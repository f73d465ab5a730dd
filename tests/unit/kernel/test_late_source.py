"""Row tiles of several sources: what is multiplied before a late source's rows come."""

import threading
import time

import numpy as np
import pytest
from cases import assert_same_bits, random_tokens, tiny_config
from test_closing import Together

from flashmoe_numba import FlashMoE
from flashmoe_numba.seeing.trace import decode
from reference.runs import RowRun
from reference.task_kinds import GEMM0, RECEIVE

LATE_S = 0.2  # on a busy machine a wait settles after some 50 ms, on an idle one after 2
LATE = 2  # the rank that comes last
ROWS = 9  # of each source for expert 0: two tiles of 4 rows and a rest, or with another source's four tiles and a rest


def routed_to_expert_0(config):
    tokens = [ROWS] * config.num_ranks
    idx = [np.zeros((count, 1), np.int32) for count in tokens]
    return random_tokens(config, tokens), dict(topk_idx=idx, topk_weights=[np.ones((count, 1)) for count in tokens])


@pytest.fixture(scope="module")
def late():
    """(results, records of rank 0, its row tiles) of a call to which one rank came late."""
    config = tiny_config(num_ranks=3, num_experts=3, num_topk=1, num_tokens=ROWS, tile_m=4, tile_m_min=2)
    together = Together(config)
    x, routing = routed_to_expert_0(config)
    layers = together.layers(trace=True)
    results = [None] * config.num_ranks

    def call(rank, epoch):
        if rank == LATE and epoch == 1:  # in the second call, when all is compiled and warm
            time.sleep(LATE_S)
        results[rank] = layers[rank](x[rank], **{name: part[rank] for name, part in routing.items()})

    for epoch in range(2):
        threads = [threading.Thread(target=call, args=(rank, epoch)) for rank in range(config.num_ranks)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    records, tiles = decode(layers[0].traces), layers[0].row_tiles
    closing = [threading.Thread(target=layer.close) for layer in layers]
    [thread.start() for thread in closing]
    [thread.join() for thread in closing]
    with FlashMoE(config, together.weights, packing="none") as layer:
        assert_same_bits(results, layer(x, **routing), "the bits of packets with tiles of their own")
    return records, tiles[0]


def test_tiles_of_others_run_before_a_late_source_comes(late):
    """Full ones, and as processors have nothing else to do, also the rows that do not fill one."""
    records, tiles = late
    came = {record.peer: record.start_ns for record in records if record.kind == RECEIVE and record.expert == 0}
    assert came[LATE] - max(came[0], came[1]) > LATE_S / 2 * 1e9
    names = {
        (record.peer, record.m) for record in records if record.kind == GEMM0 and record.start_ns < came[LATE] - 1e6
    }
    early = [tile for tile in tiles if (tile.peer, tile.m) in names]
    assert sum(tile.num_rows for tile in early) == 2 * ROWS
    assert sum(tile.num_rows == 4 for tile in early) >= 4 - 1 and any(tile.num_rows < 4 for tile in early)


def test_rows_of_the_late_source_have_tiles_of_their_own(late):
    _, tiles = late
    assert [tile.runs for tile in tiles if tile.peer == LATE] == [
        (RowRun(LATE, 0, 4),), (RowRun(LATE, 4, 4),), (RowRun(LATE, 8, 1),)
    ]  # fmt: skip
