"""Rows that do not fill a tile: they wait while processors have work, and go when one has none."""

import pytest
from cases import tiny_config

from flashmoe_numba import FlashMoE
from flashmoe_numba.device.compilation import interpreted
from flashmoe_numba.device.fibers import Scheduler
from flashmoe_numba.kernel.queue import HEAD, TAIL, counter
from reference import Weights

CONFIG = tiny_config(num_ranks=3, num_experts=3, num_topk=1, num_tokens=9, tile_m=4, tile_m_min=2)


def on_a_fiber(body):
    """What a function returns that runs as the only lane of a block."""
    results, scheduler = [], Scheduler()
    scheduler.add_block("test", lambda: results.append(body()), ())
    scheduler.run()
    return results[0]


@pytest.fixture
def rank():
    with FlashMoE(CONFIG, Weights.random(CONFIG), backend="fibers", num_processors=1) as layer:
        yield layer._ranks[0]


def waiting(rank, rows, packed=True):
    """The problem of a call in which source 1 has sent `rows` rows to expert 0, cut as they came."""
    p = rank.problem._replace(epoch=1, packed=packed)
    kernel = interpreted("flashmoe_numba.kernel")
    kernel.row_tiles.begin_stream(rank.received, 0)
    return p, kernel.subscriber, on_a_fiber(lambda: come(p, kernel.subscriber, rank, [(1, rows)]))


def come(p, subscriber, rank, packets):
    """Packets for expert 0, (source, rows) each, are admitted; returns how many tiles that makes."""
    for source, rows in packets:
        subscriber.append_packet(p, rank.received, 0, source, rows)
        least = p.tile_m if subscriber.is_held_back(p, rank.received, 0) else 1
        subscriber.cut_tiles(p, rank.segments, rank.received, rank.queue, 0, least)
    return subscriber.queue_tiles(p, rank.received, rank.queue, 0)


@pytest.mark.parametrize(("packed", "full"), [(True, 2), (False, 3)])
def test_full_tiles_go_at_once_and_the_rest_waits_only_if_others_may_come(rank, packed, full):
    _, subscriber, tiles = waiting(rank, 9, packed)
    assert tiles == full
    assert on_a_fiber(lambda: subscriber.rows_waiting(rank.received, 0)) == (1 if packed else 0)


@pytest.mark.parametrize(("idle", "cut"), [(-1, 0), (0, 0), (1, 1)])
def test_a_rest_goes_when_a_processor_has_a_ticket_without_a_task(rank, idle, cut):
    p, subscriber, _ = waiting(rank, 9)
    counters = rank.queue.counters
    counters[counter.py_func(p, HEAD)] = counters[counter.py_func(p, TAIL)] + idle
    assert on_a_fiber(lambda: subscriber.cut_rests(p, rank.segments, rank.received, rank.queue)) == cut
    assert on_a_fiber(lambda: subscriber.rows_waiting(rank.received, 0)) == 1 - cut


def test_the_last_packet_cuts_all_also_an_empty_one(rank):
    p, subscriber, _ = waiting(rank, 9)
    assert on_a_fiber(lambda: come(p, subscriber, rank, [(0, 1)])) == 0
    assert on_a_fiber(lambda: come(p, subscriber, rank, [(2, 0)])) == 1
    rank.received.seen[:] = 1  # as `open_packet` notes
    tiles = rank.row_tiles(1)[0]
    assert [[tuple(run) for run in tile.runs] for tile in tiles if len(tile.runs) > 1] == [[(1, 8, 1), (0, 0, 1)]]
