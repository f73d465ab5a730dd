"""Slots and tasks of the kernel, read from its own arrays and traces, against the reference's."""

from collections import Counter

import numpy as np
import pytest
from cases import random_routing, random_tokens, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from worlds import configs, token_counts

from flashmoe_numba import FlashMoE
from flashmoe_numba.kernel.queue import EXPERT, KIND, PEER, STAMP, TASK_WORDS, M, N
from flashmoe_numba.kernel.trace import RECEIVE, RECORD_WORDS
from reference import GATE, Task, Weights, make_packets, task_graph

backends = st.sampled_from([{"backend": "cpu"}, {"backend": "fibers", "lanes": 1}, {"backend": "fibers", "lanes": 3}])


@st.composite
def routed_layers(draw):
    config = draw(configs(max_ranks=3, dtypes=("float32",)))
    counts, seed = draw(token_counts(config)), draw(st.integers(0, 2**32))
    bias = draw(st.sampled_from([0.0, 2.0, 50.0]))
    return config, random_tokens(config, counts, seed), random_routing(config, counts, seed, bias)


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
        chosen = [int(topk_idx.flat[pair]) for pair in pairs]
        assert bases[b].tolist() == used, f"{case}, token block {b}: first slots"
        for pair, expert in zip(pairs, chosen, strict=True):
            assert bases[b, expert] + tokens.place[pair] == used[expert], f"{case}: slot of pair {pair}"
            used[expert] += 1
        assert counts[b].tolist() == np.bincount(chosen, minlength=config.num_experts).tolist(), f"{case}, block {b}"
        assert starts[b].tolist() == (np.cumsum(counts[b]) - counts[b]).tolist(), f"{case}, block {b}"
        by_expert = sorted(pairs, key=lambda pair: (topk_idx.flat[pair], pair))
        assert tokens.order[pairs.start : pairs.stop].tolist() == by_expert, f"{case}, token block {b}: order"
    assert tokens.sent.tolist() == np.minimum(used, config.slots).tolist(), f"{case}: rows sent"


def traced_tasks(layer, rank):
    """{Task: (start, end)} from the rank's traces."""
    times = {}
    for (owner, _), trace in layer.traces.items():
        if owner == rank:
            records = trace[RECORD_WORDS : (trace[0] + 1) * RECORD_WORDS].reshape(-1, RECORD_WORDS).tolist()
            for kind, peer, expert, m, n, start, end, _ in records:
                task = Task(kind, rank, peer, expert, m, 0 if kind == RECEIVE else n)
                assert task not in times, f"{layer.config}: {task} ran twice"
                times[task] = (start, end)
    return times


def queued_tasks(layer, rank, epoch):
    """Counter of what the rank's queue holds of this epoch."""
    places = layer._ranks[rank].queue.tasks.reshape(-1, TASK_WORDS)
    places = places[places[:, STAMP] == epoch]
    return Counter(Task(int(p[KIND]), rank, int(p[PEER]), int(p[EXPERT]), int(p[M]), int(p[N])) for p in places)


@given(routed_layers(), st.integers(1, 3), backends)
def test_slots_and_tasks_are_the_references(layer, num_processors, backend):
    config, x, (topk_idx, topk_weights) = layer
    packets = [make_packets(idx, config) for idx in topk_idx]
    graph = task_graph(packets, config)
    with FlashMoE(config, Weights.random(config), num_processors=num_processors, trace=True, **backend) as layer:
        for epoch in (1, 2):
            layer(x, topk_idx=topk_idx, topk_weights=topk_weights)
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
            assert set(times) == set(graph), f"{config}: {set(times) ^ set(graph)}"
            check_order(times, graph, config)


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
