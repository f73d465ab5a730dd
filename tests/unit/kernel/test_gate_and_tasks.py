"""Choices, slots, tasks and counters of the kernel, read from its own arrays and traces, against the reference's."""

from collections import Counter

import numpy as np
import pytest
from cases import random_routing, random_tokens, tiny_config, with_no_choices
from hypothesis import given
from hypothesis import strategies as st
from numba import njit
from worlds import configs, token_counts

from flashmoe_numba import FlashMoE
from flashmoe_numba.kernel.queue import STAMP, TASK_WORDS, WHERE, WHO, QueueTask, pack, task_of, unpack
from flashmoe_numba.kernel.trace import EVENT_WORDS
from reference import GATE, Task, Weights, make_packets, softmax_topk, task_graph
from reference.runs import PACKINGS, row_tiles, tiling_problem
from reference.task_kinds import RECEIVE

backends = st.sampled_from([{"backend": "cpu"}, {"backend": "fibers", "lanes": 1}, {"backend": "fibers", "lanes": 3}])


@st.composite
def routed_layers(draw):
    config = draw(configs(max_ranks=3, dtypes=("float32",)))
    counts, seed = draw(token_counts(config)), draw(st.integers(0, 2**32))
    bias = draw(st.sampled_from([0.0, 2.0, 50.0]))
    routing = random_routing(config, counts, seed, bias)
    if draw(st.booleans()):
        routing = with_no_choices(config, routing, seed)
    return config, random_tokens(config, counts, seed), routing


def check_slots(layer, rank, topk_idx):
    """Every pair's slot, block by block: the arrays of `Tokens` against a loop over the pairs."""
    config, tokens = layer.config, layer._ranks[rank].tokens
    num_pairs, blocks = topk_idx.size, -(-len(topk_idx) // config.token_block)
    pairs_per_block, used = config.token_block * config.num_topk, [0] * config.num_experts
    counts, bases, starts = (
        array[: blocks * config.num_experts].reshape(blocks, config.num_experts)
        for array in (tokens.counts, tokens.bases, tokens.starts)
    )
    case = f"{config}, rank {rank}"
    for b in range(blocks):
        pairs = range(b * pairs_per_block, min((b + 1) * pairs_per_block, num_pairs))
        pairs = [pair for pair in pairs if 0 <= topk_idx.flat[pair] < config.num_experts]
        chosen = [int(topk_idx.flat[pair]) for pair in pairs]
        assert bases[b].tolist() == used, f"{case}, token block {b}: first slots"
        for pair, expert in zip(pairs, chosen, strict=True):
            assert bases[b, expert] + tokens.place[pair] == used[expert], f"{case}: slot of pair {pair}"
            used[expert] += 1
        assert counts[b].tolist() == [chosen.count(e) for e in range(config.num_experts)], f"{case}, block {b}"
        assert starts[b].tolist() == (np.cumsum(counts[b]) - counts[b]).tolist(), f"{case}, block {b}"
        by_expert = sorted(pairs, key=lambda pair: (topk_idx.flat[pair], pair))
        order = tokens.order[b * pairs_per_block :][: len(pairs)].tolist()
        assert order == by_expert, f"{case}, token block {b}: order"
    assert tokens.sent.tolist() == np.minimum(used, config.slots).tolist(), f"{case}: rows sent"


def traced_tasks(layer, rank):
    """{Task: (start, end)} from the rank's traces."""
    times = {}
    for (owner, _), trace in layer.traces.items():
        if owner == rank:
            records = trace[EVENT_WORDS : (trace[0] + 1) * EVENT_WORDS].reshape(-1, EVENT_WORDS).tolist()
            for kind, peer, expert, m, n, start, end, _ in records:
                task = Task(kind, rank, peer, expert, m, 0 if kind == RECEIVE else n)
                assert task not in times, f"{layer.config}: {task} ran twice"
                times[task] = (start, end)
    return times


def queued_tasks(layer, rank, epoch):
    """Counter of what the rank's queue holds of this epoch."""
    places = layer._ranks[rank].queue.tasks.reshape(-1, TASK_WORDS)
    places = places[places[:, STAMP] == epoch]
    tasks = [task_of(who, where) for who, where in places[:, [WHO, WHERE]].tolist()]
    return Counter(Task(task.kind, rank, *task[1:]) for task in tasks)


@pytest.mark.parametrize("task", [(0, 0, 0, 0, 0), (4, 1, 2, 3, 5), (255, 2**24 - 1, 2**31 - 1, 2**32 - 1, 2**31 - 1)])
def test_a_task_survives_its_two_words(task):
    roundtrip = njit(lambda *task: unpack(*pack(QueueTask(*task))))
    assert roundtrip(*task) == task


@given(routed_layers(), st.integers(1, 3), st.sampled_from(PACKINGS), backends)
def test_slots_and_tasks_are_the_references(layer, num_processors, packing, backend):
    config, x, (topk_idx, topk_weights) = layer
    given, topk_idx = topk_idx, [np.where(idx < config.num_choices, idx, -1) for idx in topk_idx]
    packets = [make_packets(idx, config) for idx in topk_idx]
    how = dict(num_processors=num_processors, trace=True, packing=packing)
    with FlashMoE(config, Weights.random(config), **how, **backend) as layer:
        for epoch in (1, 2):
            layer(x, topk_idx=given, topk_weights=topk_weights)
            times = {}
            for rank in range(config.num_ranks):
                check_slots(layer, rank, topk_idx[rank])
                here = traced_tasks(layer, rank)
                received = {task for task in here if task.kind == RECEIVE}
                expected = {
                    Task(RECEIVE, rank, source, expert)
                    for source in range(config.num_ranks)
                    for expert in range(config.num_experts_per_rank)
                }
                assert received == expected, f"{config}: packets seen"
                here = {task: when for task, when in here.items() if task.kind != RECEIVE}
                assert queued_tasks(layer, rank, epoch) == Counter(list(here)), (
                    f"{config}: queued but not run, or the reverse"
                )
                if len(x[rank]) == 0:
                    del here[Task(GATE, rank)]  # tells the peers that there is nothing
                times |= here
            tiles = check_tiles(layer, packets, packing)
            graph = task_graph(packets, config, tiles)
            assert set(times) == set(graph), f"{config}: {set(times) ^ set(graph)}"
            check_order(times, graph, config)


def check_tiles(layer, packets, packing):
    """The row tiles of every expert, which hold each row once."""
    tiles = [of_expert for of_rank in layer.row_tiles for of_expert in of_rank]
    for expert, of_expert in enumerate(tiles):
        rows = [int(packet.sent[expert]) for packet in packets]
        assert tiling_problem(of_expert, rows, layer.config) is None, f"{layer.config}, expert {expert}"
        assert packing == "sources" or of_expert == row_tiles(rows, layer.config), f"{layer.config}, expert {expert}"
    return tiles


def check_order(times, graph, config):
    """No task began before what it waits for had begun.

    (Its end is too late a time: others go on as soon as a task's signal is set, and then it makes its record.)
    """
    for task, needs in graph.items():
        for need in needs:
            assert times[need][0] <= times[task][0], f"{config}: {task} began before {need}"


@pytest.mark.parametrize("backend", ["cpu", "fibers"])
def test_one_token_per_block_and_one_block_for_all(backend):
    for token_block in (1, 2, 7, 100):
        config = tiny_config(token_block=token_block, capacity=3)
        topk_idx, topk_weights = random_routing(config, [7, 0], seed=token_block, bias=3.0)
        with FlashMoE(config, Weights.random(config), backend=backend) as layer:
            layer(random_tokens(config, [7, 0]), topk_idx=topk_idx, topk_weights=topk_weights)
            for rank in range(2):
                check_slots(layer, rank, topk_idx[rank])


# Logits of one token for each column of `LOGITS`: its x has one element, `SIZES`, so that a logit is one product.
LOGITS = np.array([
    [-200, -199.5, -201, -200.5],  # the exponentials of these, as they are, are all 0
    [-4e30, -1e30, -2e30, -3e30],
    [10, 0, 0, 0], [0, 0, 0, 10], [0, 10, 10, 0], [0, 0, -10, 0], [-10, -10, -10, -10],  # become infinite
    [1, 3, 2, 3], [5, 1, 1, 1],
])  # fmt: skip
SIZES = [1, 1, 3e38, 3e38, 3e38, 3e38, 3e38, 1, np.nan]


@pytest.mark.parametrize("backend", ["cpu", "fibers"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_choices_of_logits_far_from_zero_and_of_infinite_ones(backend, renormalize):
    config = tiny_config(num_tokens=len(SIZES), hidden=len(SIZES), renormalize=renormalize)
    weights = Weights.random(config)
    weights.router[:] = LOGITS.T
    x = np.diag(np.array(SIZES, np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        logits = np.stack([size * row for size, row in zip(np.float32(SIZES), LOGITS.astype(np.float32), strict=True)])
    logits[-1] = np.nan
    expected = softmax_topk(logits, config.num_topk, renormalize)
    bad = [False, False, True, True, True, False, True, False, True]
    chosen = [[1, 0], [1, 2], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [1, 3], [0, 1]]
    assert expected.topk_idx.tolist() == chosen and np.isnan(expected.topk_weights).all(axis=1).tolist() == bad
    with FlashMoE(config, weights, backend=backend, num_processors=1) as layer:
        layer([x, x[:0]])
        routing, stats = layer.routing[0], layer.stats
    assert routing.topk_idx.tolist() == chosen
    np.testing.assert_allclose(routing.topk_weights, expected.topk_weights, rtol=1e-6, equal_nan=True)
    assert [s.nonfinite_tokens for s in stats] == [sum(bad), 0]


def test_stats_are_those_of_a_case_worked_out_by_hand():
    """Three ranks of two experts; tiles of 2 and 4 rows; capacity 6."""
    config = tiny_config(num_ranks=3, num_experts=6, num_topk=1, num_tokens=9, capacity=6)
    routes = [[0, 0, 0, 0, 0, 1, 3, -1, 6], [1, 1, 1, 5, 5], [4, 4, 4, 4, 4, 4, 4, 4, -1]]
    idx = [np.array(route)[:, None] for route in routes]
    with FlashMoE(config, Weights.random(config), backend="fibers", num_processors=1, lanes=1, packing="none") as layer:
        factors = [np.ones(part.shape) for part in idx]
        layer(random_tokens(config, [9, 5, 9]), topk_idx=idx, topk_weights=factors)
        stats = layer.stats
    assert [s.rows_per_expert for s in stats] == [(5, 1 + 3), (0, 1), (6, 2)]
    assert [s.row_tiles for s in stats] == [2 + 1 + 1, 1, 2 + 1]
    assert [s.padded_rows for s in stats] == [4 + 2 + 2 + 4, 2, 4 + 2 + 2]
    assert [s.received_rows for s in stats] == [9, 1, 8]
    assert [s.sent_rows for s in stats] == [7, 5, 6]
    assert [s.dropped_pairs for s in stats] == [0, 0, 2]
    assert stats[0].padded_row_share == 1 - 9 / 12
