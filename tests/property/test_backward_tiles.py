"""The tasks of a backward wait for what they use, and what they store at peers meets nowhere."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import Layout, MoEConfig, Task, make_packets, write_conflicts
from reference.backward_tiles import DOWN, GATED, UP, backward_task_graph, backward_writes
from reference.layout import AGAIN, DISPATCH, DOTS, FACTORS, RESULT, SAVES
from reference.runs import RowRun, RowTile, expert_tiles
from reference.task_kinds import (
    COMBINE,
    GATE,
    GEMM0,
    GEMM1,
    NORM_WEIGHTS,
    ROUTER_WEIGHTS,
    SHARED0,
    SHARED1,
    SHARED_WEIGHTS,
    WEIGHTS,
)
from reference.task_kinds import DISPATCH as DISPATCHED

fixed = settings(derandomize=True, deadline=None, max_examples=40, database=None)


@st.composite
def routed_layers(draw):
    """(config, packets of each rank): skewed routings with dropped pairs, pairs without an expert, and idle ranks."""
    num_ranks, per_rank = draw(st.sampled_from([1, 2, 3, 5])), draw(st.integers(1, 4))
    num_tokens, low = draw(st.integers(1, 23)), draw(st.sampled_from([1, 2, 3]))
    config = MoEConfig(
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        hidden=draw(st.sampled_from([1, 5, 33])),
        ffn=draw(st.sampled_from([1, 7, 24])),
        num_experts=num_ranks * per_rank,
        num_topk=draw(st.integers(1, min(3, num_ranks * per_rank))),
        gated=draw(st.booleans()),
        shared_ffn=draw(st.sampled_from([0, 5])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float64"])),
        capacity=draw(st.none() | st.integers(1, num_tokens)),
        tile_m=low * draw(st.sampled_from([1, 2, 4])),
        tile_m_min=low,
        tile_n=draw(st.sampled_from([1, 8, 100])),
        token_block=draw(st.sampled_from([1, 4, 32])),
    )
    if draw(st.booleans()):
        normed = replace(config.expert_kind, norm_eps=1e-5)
        config = replace(config, expert=normed, shared_expert=config.shared_kind)
    rng, counts = np.random.default_rng(draw(st.integers(0, 2**32))), st.integers(0, num_tokens)
    packets = []
    for _ in range(num_ranks):
        favour = rng.choice([0.0, 5.0]) * rng.standard_normal(config.num_experts)
        noise = rng.standard_normal((draw(counts), config.num_experts))
        topk_idx = np.argsort(noise + favour, axis=1)[:, : config.num_topk].astype(np.int32)
        topk_idx[rng.random(topk_idx.shape) < rng.choice([0.0, 0.3])] = -1
        packets.append(make_packets(topk_idx, config))
    return config, packets


# ---- what is stored at peers


@fixed
@given(routed_layers(), st.sampled_from(SAVES))
def test_writes_are_valid_complete_and_free_of_conflicts(layer, save):
    config, packets = layer
    layout = Layout(config, save)
    writes = list(backward_writes(packets, config, save=save))
    assert all(layout.is_valid(write) for write in writes) and write_conflicts(layout, writes) == []
    num_rows = sum(int(packet.sent.sum()) for packet in packets)
    rounds = [write.round for write in writes]
    expected = {DISPATCH: 1, RESULT: 1, FACTORS: 1, DOTS: 1, AGAIN: save == "nothing"}
    assert {round: rounds.count(round) for round in expected} == {r: n * num_rows for r, n in expected.items()}


@fixed
@given(routed_layers(), st.sampled_from(SAVES))
def test_no_two_rows_share_a_byte_nor_one_with_a_flag(layer, save):
    """By their bytes, not by their offsets, which are of rows of two sizes."""
    config, packets = layer
    layout, numbers = Layout(config, save), (FACTORS, DOTS)
    at = sorted((*layout.offset(write), write.round) for write in backward_writes(packets, config, save=save))
    words, row = config.accumulator.itemsize, config.hidden * config.numpy_dtype.itemsize
    ends = [(segment, start + (words if round in numbers else row)) for segment, start, round in at]
    assert all(end <= following[:2] for end, following in zip(ends, at[1:], strict=False))
    assert all(end <= layout.dispatch_flag for _, end in ends)


@fixed
@given(routed_layers(), st.sampled_from(SAVES), st.integers(0, 2**32))
def test_a_wrong_writer_is_found(layer, save, seed):
    """One that stores where another does, in any region: a conflict with it, and no valid write."""
    config, packets = layer
    layout, rng = Layout(config, save), np.random.default_rng(seed)
    writes = list(backward_writes(packets, config, save=save))
    for round in layout.rounds:
        mine = [write for write in writes if write.round == round]
        if not mine:
            continue
        victim = mine[int(rng.integers(len(mine)))]
        wrong = victim._replace(writer=victim.writer + 1)
        assert write_conflicts(layout, [*writes, wrong]) == [(victim, wrong)]
        assert not layout.is_valid(wrong)


def test_regions_that_are_not_there_have_no_valid_writes():
    config = MoEConfig(num_ranks=2, num_tokens=3, hidden=4, ffn=4, num_experts=2, num_topk=1)
    packets = [make_packets(np.zeros((3, 1), np.int32), config)] * 2
    writes = list(backward_writes(packets, config, save="nothing"))
    found = {save: {w.round for w in writes if Layout(config, save).is_valid(w)} for save in (None, *SAVES)}
    kept = {DISPATCH, RESULT, FACTORS, DOTS}
    assert found == {None: {DISPATCH, RESULT}, "rows+up": kept, "rows": kept, "nothing": kept | {AGAIN}}
    with pytest.raises(ValueError, match="save must be one of"):
        next(backward_writes(packets, config, save="all"))


# ---- what tasks wait for


@fixed
@given(routed_layers(), st.booleans())
def test_tasks_wait_for_all_that_they_use(layer, routed):
    """Told by rows: each by its own loop over pairs, not by the graph of a forward."""
    config, packets = layer
    graph = backward_task_graph(packets, config, routed=routed, gradient_tile=(3, 4))
    tokens = [len(packet.slot) for packet in packets]
    here, ups = config.num_experts_per_rank, config.ffn * config.expert_kind.num_ups
    tiles = expert_tiles(packets, config)
    of_kind = {kind: [task for task in graph if task.kind == kind] for kind in range(12)}
    ranks = range(config.num_ranks)
    assert of_kind[GATE] == [Task(GATE, rank) for rank in ranks] and not any(graph[task] for task in of_kind[GATE])
    assert len(of_kind[DISPATCHED]) == config.num_ranks * config.num_experts
    assert all(graph[task] == [Task(GATE, task.rank)] for task in of_kind[DISPATCHED])
    for expert, of_expert in enumerate(tiles):
        rank, local = divmod(expert, here)
        hidden = {Task(GEMM0, rank, tile.peer, local, tile.m, n) for tile in of_expert for n in _columns(config)[0]}
        assert hidden == {task for task in of_kind[GEMM0] if (task.rank, task.expert) == (rank, local)}
        sent = {Task(DISPATCHED, source, rank, local) for source in ranks}
        weights = [task for task in of_kind[WEIGHTS] if (task.rank, task.expert) == (rank, local)]
        assert all(set(graph[task]) == hidden | sent for task in weights)
        sizes = {UP: (ups, config.hidden), DOWN: (config.hidden, config.ffn)} if of_expert else {}
        assert sorted((task.peer, task.m, task.n) for task in weights) == _matrix_tiles(sizes)
    for task in of_kind[GEMM0]:
        assert {need.rank for need in graph[task]} >= {task.peer}
        assert {need.kind for need in graph[task]} == {DISPATCHED}
    for task in of_kind[GEMM1]:
        assert set(graph[task]) == {task._replace(kind=GEMM0, n=n) for n in _columns(config)[0]}
    for rank in ranks:
        combines = {task for task in of_kind[COMBINE] if task.rank == rank}
        assert len(combines) == -(-tokens[rank] // config.token_block)
        router = [task for task in of_kind[ROUTER_WEIGHTS] if task.rank == rank]
        assert all(set(graph[task]) == combines for task in router)
        trained = tokens[rank] and not routed
        assert sorted(t[2:] for t in router) == [(0, 0, *t[1:]) for t in _matrix_tiles(
            {0: (config.num_choices, config.hidden)} if trained else {})]  # fmt: skip
        shared = {task for task in of_kind[SHARED0] if task.rank == rank}
        mine = [task for task in of_kind[SHARED_WEIGHTS] if task.rank == rank]
        assert all(set(graph[task]) == shared for task in mine) and bool(mine) == bool(shared)
        assert all(not graph[task] for task in shared)
        norm = [task for task in of_kind[NORM_WEIGHTS] if task.rank == rank]
        assert all(set(graph[task]) == {t for t in of_kind[DISPATCHED] if t.rank == rank} for task in norm)
        scaled = {0: (1, config.hidden)} if tokens[rank] and config.expert_kind.norm_eps is not None else {}
        assert sorted((task.peer, task.m, task.n) for task in norm) == _matrix_tiles(scaled)


@fixed
@given(routed_layers())
def test_a_token_block_waits_for_all_its_rows(layer):
    config, packets = layer
    graph, here = backward_task_graph(packets, config), config.num_experts_per_rank
    tiles = {
        (run.source, expert, slot): (*divmod(expert, here), tile.peer, tile.m)
        for expert, of_expert in enumerate(expert_tiles(packets, config))
        for tile in of_expert
        for run in tile.runs
        for slot in run.slots
    }
    for task, needs in graph.items():
        if task.kind != COMBINE:
            continue
        packet, block = packets[task.rank], slice(task.m * config.token_block, (task.m + 1) * config.token_block)
        pairs = zip(packet.topk_idx[block].ravel().tolist(), packet.slot[block].ravel().tolist(), strict=True)
        wanted = {tiles[task.rank, expert, slot] for expert, slot in pairs if slot >= 0}
        results = {(need.rank, need.expert, need.peer, need.m) for need in needs if need.kind == GEMM1}
        assert wanted <= results
        assert bool(results) == bool(wanted) and (results or Task(GATE, task.rank) in needs)
        assert any(need.kind == SHARED1 for need in needs) == bool(config.shared_ffn)


@fixed
@given(routed_layers())
def test_every_task_has_its_turn(layer):
    """Nothing waits for a task that is not there, or for itself by way of others."""
    config, packets = layer
    graph, done = backward_task_graph(packets, config), set()
    while len(done) < len(graph):
        ready = [task for task, needs in graph.items() if task not in done and done.issuperset(needs)]
        assert ready, "the rest waits for each other, or for nobody"
        done.update(ready)


def test_a_graph_with_tiles_of_a_run():
    """Tiles with rows of several sources: WEIGHTS wait for theirs, whatever they are."""
    config = MoEConfig(num_ranks=2, num_tokens=4, hidden=4, ffn=4, num_experts=2, num_topk=1, tile_m=8, tile_m_min=1)
    packets = [make_packets(np.zeros((count, 1), np.int32), config) for count in (4, 3)]
    graph = backward_task_graph(packets, config, [[RowTile(0, 0, 8, (RowRun(0, 0, 4), RowRun(1, 0, 3)))], []])
    assert [task for task in graph if task.kind == GEMM0] == [Task(GEMM0, 0)]
    expected = [Task(DISPATCHED, 0), Task(DISPATCHED, 1), Task(GEMM0, 0)]
    assert graph[Task(WEIGHTS, 0, UP)] == graph[Task(WEIGHTS, 0, DOWN)] == expected
    assert str(Task(WEIGHTS, 0, DOWN)) == "WEIGHTS(rank=0, peer=1, expert=0, m=0, n=0)"


def test_the_gate_of_a_shared_expert_has_a_gradient():
    sizes = {"num_ranks": 1, "num_tokens": 3, "hidden": 4, "ffn": 4, "num_experts": 2, "num_topk": 1, "shared_ffn": 2}
    packets = [make_packets(np.zeros((3, 1), np.int32), MoEConfig(**sizes))]
    for gated in (False, True):
        graph = backward_task_graph(packets, MoEConfig(**sizes, shared_gate=gated))
        assert (Task(SHARED_WEIGHTS, 0, GATED) in graph) == gated


def _columns(config):
    return range(-(-config.ffn // config.tile_ffn)), range(-(-config.hidden // config.tile_n))


def _matrix_tiles(sizes):
    return sorted(
        (matrix, m, n) for matrix, (rows, columns) in sizes.items() for m in range(-(-rows // 3))
        for n in range(-(-columns // 4))
    )  # fmt: skip
