"""The tasks that a backward runs are those of the reference's graph, under their names."""

import pytest
from cases import random_tokens, tiny_config
from kinds import NORMED

from flashmoe_numba import FlashMoE
from flashmoe_numba.seeing.trace import decode
from flashmoe_numba.tile_gemm import GRADIENT_COLUMNS, GRADIENT_ROWS
from reference import Task, Weights, make_packets
from reference.backward_tiles import backward_task_graph
from reference.task_kinds import RECEIVE

CALLS = [("rows+up", "sources", (7, 7)), ("rows", "none", (0, 5)), ("nothing", "sources", (0, 5))]
LAYERS = {"shared": dict(shared_ffn=5), "normed": dict(expert=NORMED)}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("save", "packing", "counts"), CALLS)
def test_a_backward_runs_the_tasks_of_the_graph(save, packing, counts, layer):
    config = tiny_config(**LAYERS[layer])
    x, dy = random_tokens(config, counts), random_tokens(config, counts, seed=1)
    with FlashMoE(config, Weights.random(config), backend="fibers", save=save, packing=packing, trace=True) as layer:
        _, saved = layer.forward(x)
        packets = [make_packets(routing.topk_idx, config) for routing in layer.routing]
        layer.backward(saved, dy)
        events, tiles = decode(layer.traces), [of_expert for rank in layer.row_tiles for of_expert in rank]
    tasks = [Task(e.kind, e.rank, e.peer, e.expert, e.m, e.n) for e in events if e.kind != RECEIVE]
    graph = backward_task_graph(packets, config, tiles, gradient_tile=(GRADIENT_ROWS, GRADIENT_COLUMNS))
    assert sorted(tasks) == sorted(graph)
