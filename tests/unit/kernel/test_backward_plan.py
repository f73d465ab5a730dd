"""What the plan says of backwards is what a layer has: its arrays, its tasks, and the memory of a process."""

import json
from collections import Counter

import numpy as np
import pytest
from backward_cases import arrays_of
from cases import random_routing, random_tokens, tiny_config
from children import printed
from kinds import NORMED

from flashmoe_numba import FlashMoE
from flashmoe_numba.kernel.queue import TASK_WORDS
from flashmoe_numba.tile_gemm import GRADIENT_COLUMNS, GRADIENT_ROWS
from reference import RouterKind, Weights, make_packets, make_plan
from reference.backward_plan import kept_bytes, max_weight_tasks
from reference.backward_tiles import GRADIENT_TILE, backward_task_graph
from reference.layout import SAVES
from reference.sizes import hidden_rows

CONFIGS = {
    "plain": tiny_config(gated=False, activation="relu", dtype="float64"),
    "gated": tiny_config(capacity=3, dtype="bfloat16"),
    "shared": tiny_config(shared_ffn=5, shared_gate=True, num_zero=2),
    "normed": tiny_config(expert=NORMED, num_zero=2, dtype="bfloat16"),
    "logit bias": tiny_config(shared_ffn=3, router=RouterKind(score="softmax", logit_bias=True)),
}
WHOLE = tiny_config(hidden=16, ffn=8, tile_n=16, shared_ffn=8, shared_gate=True)  # whole panels: nothing is padded


def num_bytes(arrays):
    """Of all arrays among these, in groups or alone."""
    if isinstance(arrays, np.ndarray):
        return arrays.nbytes
    return sum(map(num_bytes, arrays)) if isinstance(arrays, tuple) else 0


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_plan_counts_the_arrays_of_a_layer(name, save):
    config = CONFIGS[name]
    plan = make_plan(config, save=save)
    with FlashMoE(config, Weights.random(config), backend="fibers", save=save) as layer:
        _, saved = layer.forward(random_tokens(config))
        for rank, kept in zip(layer._ranks, saved.peek(layer._ranks), strict=True):
            assert num_bytes(rank.working) == plan.backward.working_bytes
            assert len(rank.queue.tasks) == plan.backward.max_tasks * TASK_WORDS
            regions = {name: number for name, number in plan.segment_bytes.items() if number}
            assert {name: getattr(rank.segments, name).nbytes for name in regions} == regions
            assert ("again" in regions) == (save == "nothing") == (rank.segments.again.size > 0)
            room = [*kept.arrays.tokens.values(), *kept.arrays.received.values()]
            assert kept_bytes(config, save, config.num_tokens, hidden_rows(config)) == sum(a.nbytes for a in room)


@pytest.mark.parametrize("changes", [dict(shared_ffn=5), dict(expert=NORMED)])
@pytest.mark.parametrize("save", SAVES)
def test_the_plan_of_a_routing_has_the_bytes_that_a_call_keeps(save, changes):
    """Ranks without tokens and with few, most of which go to one rank; pairs dropped, pairs that choose nothing."""
    config = tiny_config(num_ranks=4, num_experts=8, capacity=3, **changes)
    counts = [7, 0, 2, 6]
    topk_idx, topk_weights = random_routing(config, counts, bias=2.0)
    topk_idx[3][:2] = -1
    chosen = np.array([np.bincount(idx[idx >= 0], minlength=8) for idx in topk_idx])
    plan = make_plan(config, chosen, counts, save).backward
    with FlashMoE(config, Weights.random(config), backend="fibers", save=save) as layer:
        _, saved = layer.forward(random_tokens(config, counts), topk_idx=topk_idx, topk_weights=topk_weights)
        assert saved.num_bytes == plan.kept_total_bytes
        assert max(rank.kept_bytes() for rank in layer._ranks) == plan.kept_bytes < plan.kept_total_bytes / 2


def test_the_plan_counts_weights_and_their_gradients():
    plan = make_plan(WHOLE, save="rows").backward
    with FlashMoE(WHOLE, Weights.random(WHOLE), backend="fibers", save="rows") as layer:
        transposed = layer.packed.transposed[0]
        gradients = layer.no_gradients().weights[0]
    matrices = [transposed.up, transposed.down, transposed.shared_up, transposed.shared_down, transposed.router]
    biases = sum(matrix.bias.nbytes for matrix in matrices)  # zeros
    assert num_bytes((*matrices, transposed.shared_gate)) - biases == plan.transposed_bytes
    assert sum(array.nbytes for array in arrays_of(gradients).values()) == plan.gradient_bytes


@pytest.mark.parametrize("name", CONFIGS)
def test_no_backward_has_more_tasks_than_the_plan_says(name):
    """Whatever the routing; the tasks that a forward has not are as many as they can be where all have tokens."""
    config = CONFIGS[name]
    for bias in (0.0, 50.0):
        topk_idx, _ = random_routing(config, [config.num_tokens] * config.num_ranks, bias=bias)
        packets = [make_packets(idx, config) for idx in topk_idx]
        graph = backward_task_graph(packets, config, gradient_tile=GRADIENT_TILE)
        of_ranks = Counter(task.rank for task in graph)
        assert max(of_ranks.values()) <= make_plan(config, save="rows").backward.max_tasks
        weights = Counter(task.rank for task in graph if task.kind > 7)
        assert max(weights.values()) <= max_weight_tasks(config)
        assert bias or max(weights.values()) == max_weight_tasks(config)
    assert GRADIENT_TILE == (GRADIENT_ROWS, GRADIENT_COLUMNS)


PROCESS = """
import json, sys
from dataclasses import replace
import numpy as np
from cases import random_tokens
from kinds import NORMED
from flashmoe_numba import FlashMoE
from reference import MoEConfig, Weights, make_plan

save = sys.argv[1]
config = MoEConfig(num_ranks=2, num_tokens=4096, hidden=512, ffn=256, num_experts=8, num_topk=2, gated=True,
                   activation="silu", tile_m=192, tile_m_min=3)
if "normed" in sys.argv:
    config = replace(config, expert=NORMED)
x = random_tokens(config)

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmRSS"].split()[0]) * 1024

with FlashMoE(config, Weights.random(config), save=save) as layer:
    kept = [layer.forward(x)[1]]
    before = resident()
    kept.append(layer.forward(x)[1])
    grown = resident() - before
    counts = np.array([np.bincount(part.topk_idx.ravel(), minlength=8) for part in layer.routing])
    print(json.dumps([grown, kept[1].num_bytes, make_plan(config, counts, save=save).backward.kept_total_bytes]))
"""
OWN_PAGES = dict(MALLOC_MMAP_THRESHOLD_="65536", NUMPY_MADVISE_HUGEPAGE="0")  # of every array that is not small


@pytest.mark.parametrize("case", [*[(save,) for save in SAVES], ("nothing", "normed")])
def test_a_process_grows_by_what_a_call_keeps(case):
    """Room is made for twice the rows that come, and memory is taken for those that did; and for all results that go
    through a norm.
    """
    grown, saved, planned = json.loads(printed("-c", PROCESS, *case, timeout=500, **OWN_PAGES))
    assert saved == planned
    assert grown == pytest.approx(planned, rel=0.02)
