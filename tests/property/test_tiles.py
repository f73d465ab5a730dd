"""Packets, tiles and bounds on random configurations and routings: hot experts, drops, empty ranks, odd sizes."""

import dataclasses
import json
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import extras

from reference import (
    ACTIVATIONS,
    COMBINE,
    DISPATCH,
    GATE,
    GEMM0,
    GEMM1,
    KIND_NAMES,
    SHARED0,
    SHARED1,
    Layout,
    MoEConfig,
    Routing,
    Task,
    TiledLayer,
    Weights,
    check_routing,
    hidden_rows,
    make_packets,
    make_plan,
    max_rel_error,
    max_row_blocks,
    max_tasks,
    moe_layer,
    num_row_blocks,
    tile_height,
    tolerance,
    write_conflicts,
)
from reference.runs import RowRun, RowTile, row_tiles, tiling_problem

fixed = settings(derandomize=True, deadline=None, max_examples=60, database=None)


@st.composite
def configs(draw):
    num_ranks = draw(st.sampled_from([1, 2, 3, 5]))
    num_experts = num_ranks * draw(st.integers(1, 4))
    num_tokens = draw(st.integers(1, 23))
    tile_m_min = draw(st.sampled_from([1, 2, 3, 4]))
    return MoEConfig(
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        hidden=draw(st.sampled_from([1, 5, 17, 32])),
        ffn=draw(st.sampled_from([1, 7, 24])),
        num_experts=num_experts,
        **draw(extras(num_experts)),
        gated=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        dtype=draw(st.sampled_from(["float32", "float32", "float64", "float16", "bfloat16"])),
        capacity=draw(st.none() | st.integers(1, num_tokens)),
        renormalize=draw(st.booleans()),
        tile_m=tile_m_min * draw(st.sampled_from([1, 2, 4])),
        tile_m_min=tile_m_min,
        tile_n=draw(st.sampled_from([1, 3, 8, 100])),
        token_block=draw(st.sampled_from([1, 4, 9, 32])),
    )


def token_counts(config):
    one = st.sampled_from([0, 1, config.num_tokens]) | st.integers(0, config.num_tokens)
    return st.lists(one, min_size=config.num_ranks, max_size=config.num_ranks)


def skewed_topk_idx(rng, num_tokens, config):
    """Distinct experts per token: sometimes even, sometimes most tokens on a few experts, sometimes with no choices."""
    bias = rng.choice([0.0, 1.0, 5.0, 50.0]) * rng.standard_normal(config.num_choices)
    order = np.argsort(rng.standard_normal((num_tokens, config.num_choices)) + bias, axis=1)
    idx = order[:, : config.num_topk].astype(np.int32)
    idx[rng.random(idx.shape) < rng.choice([0.0, 0.0, 0.3, 1.0])] = -1
    return idx


@st.composite
def layers(draw):
    """A config, weights, x of each rank, and a routing or None."""
    config = draw(configs())
    counts, rng = draw(token_counts(config)), np.random.default_rng(draw(st.integers(0, 2**32)))
    x = [rng.standard_normal((count, config.hidden)).astype(config.numpy_dtype) for count in counts]
    idx = [skewed_topk_idx(rng, count, config) for count in counts] if draw(st.booleans()) else None
    factors = [rng.uniform(0.1, 1, part.shape) * (rng.random(part.shape) < 0.9) for part in idx] if idx else None
    return config, Weights.random(config, seed=1, bias=draw(st.booleans())), x, idx, factors


@fixed
@given(layers(), st.integers(0, 2**32))
def test_tiles_in_any_legal_order_give_the_layer(layer, order_seed):
    config, weights, x, idx, factors = layer
    tiled = TiledLayer(x, weights, config, idx, factors)
    y = tiled.run(np.random.default_rng(order_seed))
    assert tiled.done == set(tiled.graph)
    assert all(part.dtype == config.numpy_dtype for part in y)
    if idx is None:
        for part, topk_idx, topk_weights in zip(x, tiled.topk_idx, tiled.topk_weights, strict=True):
            assert check_routing(Routing(topk_idx, topk_weights), part, weights.router, config) is None
    # The routing is given to the oracle: a near tie may fall either way in another precision.
    ref = moe_layer(x, weights, config, tiled.topk_idx, tiled.topk_weights)
    assert max_rel_error(y, ref) <= tolerance(config)


@fixed
@given(layers(), st.integers(0, 2**32))
def test_writes_are_valid_complete_and_free_of_conflicts(layer, order_seed):
    config, weights, x, idx, factors = layer
    tiled = TiledLayer(x, weights, config, idx, factors)
    tiled.run(np.random.default_rng(order_seed))
    num_rows = sum(int(packet.sent.sum()) for packet in tiled.packets)
    assert tiled.conflicts() == []
    assert all(tiled.layout.is_valid(write) for writes in tiled.writes for write in writes)
    assert [len(writes) for writes in tiled.writes] == [2 * num_rows] + [num_rows] * (len(tiled.writes) - 1)


def arrivals(rng):
    """Makes another tiling: packets come in any order, and what waits is cut when a tile is full and now and then."""

    def tiles_of(rows, config):
        tiles, begun, waiting = [], Counter(), []

        def cut(count):
            slots = {}
            for source, slot in [waiting.pop(0) for _ in range(count)]:
                slots.setdefault(source, []).append(slot)
            runs = tuple(RowRun(source, own[0], len(own)) for source, own in slots.items())
            peer = runs[0].source
            tiles.append(RowTile(peer, begun[peer], tile_height(count, config.tile_m_min, config.tile_m), runs))
            begun[peer] += 1

        order = rng.permutation(len(rows)).tolist()
        for source in order:
            waiting += [(source, slot) for slot in range(rows[source])]
            while len(waiting) >= config.tile_m:
                cut(config.tile_m)
            if waiting and (source == order[-1] or rng.random() < 0.3):
                cut(len(waiting))
        return tiles

    return tiles_of


@fixed
@given(configs(), st.data())
def test_packets_that_share_tiles_have_no_more_of_them(config, data):
    """Whatever comes when: tiles are right, named within their packet's row blocks, and no more than the bound."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    counts = data.draw(token_counts(config))
    packets = [make_packets(skewed_topk_idx(rng, count, config), config) for count in counts]
    tiles_of, tiles = arrivals(rng), []
    for expert in range(config.num_experts):
        rows = [int(packet.sent[expert]) for packet in packets]
        tiles.append(tiles_of(rows, config))
        assert tiling_problem(tiles[-1], rows, config) is None
        assert tiling_problem(row_tiles(rows, config), rows, config) is None
        for tile in tiles[-1]:
            assert tile.m < num_row_blocks(rows[tile.peer], config.tile_m_min, config.tile_m)
    here = config.num_experts_per_rank
    for rank in range(config.num_ranks):
        assert sum(map(len, tiles[rank * here : (rank + 1) * here])) <= max_row_blocks(config)


def test_what_is_wrong_with_tiles():
    config = MoEConfig(num_ranks=3, num_tokens=9, hidden=4, ffn=4, num_experts=3, num_topk=1, tile_m=4, tile_m_min=2)
    good = [RowTile(2, 0, 4, (RowRun(2, 0, 1), RowRun(0, 0, 3))), RowTile(0, 0, 2, (RowRun(0, 3, 2),))]
    rows = [5, 0, 1]
    assert tiling_problem(good, rows, config) is None
    first, last = good
    for bad, words in (
        ([first], "rows of source 0 must be in one tile"),
        ([*good, last], "rows of source 0 must be in one tile"),
        ([dataclasses.replace(first, height=2), last], "the lowest height"),
        ([dataclasses.replace(first, peer=0), last], "named by its first run"),
        ([first, dataclasses.replace(last, m=1)], "numbered in order"),
        ([RowTile(0, 0, 8, (RowRun(0, 0, 5), RowRun(2, 0, 1)))], "1 to tile_m=4 rows"),
        ([first, RowTile(0, 0, 2, (RowRun(0, 3, 1), RowRun(0, 4, 1)))], "one run of a packet"),
        (
            [RowTile(0, m, 2, (RowRun(0, m, 1),)) for m in range(5)] + [RowTile(2, 0, 2, (RowRun(2, 0, 1),))],
            "at most 2",
        ),
        ([first, RowTile(0, 0, 2, (RowRun(0, 3, 2), RowRun(1, 0, 0)))], "runs of one row or more"),
    ):
        assert words in tiling_problem(bad, rows, config), bad


@fixed
@given(layers(), st.integers(0, 2**32))
def test_tiles_with_rows_of_several_sources_give_the_layer(layer, order_seed):
    config, weights, x, idx, factors = layer
    with patch("reference.runs.row_tiles", arrivals(np.random.default_rng(order_seed))):
        tiled = TiledLayer(x, weights, config, idx, factors)
    y = tiled.run(np.random.default_rng(order_seed))
    ref = moe_layer(x, weights, config, tiled.topk_idx, tiled.topk_weights)
    assert max_rel_error(y, ref) <= tolerance(config)
    num_rows = sum(int(packet.sent.sum()) for packet in tiled.packets)
    assert tiled.conflicts() == []
    assert [len(writes) for writes in tiled.writes] == [2 * num_rows] + [num_rows] * (len(tiled.writes) - 1)


@fixed
@given(layers(), st.integers(0, 2**32))
def test_a_corrupted_write_is_a_conflict(layer, order_seed):
    config, weights, x, idx, factors = layer
    rng = np.random.default_rng(order_seed)
    tiled = TiledLayer(x, weights, config, idx, factors)
    tiled.run(rng)
    writes = tiled.writes[0]
    layout = Layout(config)
    for write in writes[:3]:
        victims = [other for other in writes if (other.segment, other.round) == (write.segment, write.round)]
        victim = victims[int(rng.integers(len(victims)))]
        corrupted = write._replace(peer=victim.peer, expert=victim.expert, slot=victim.slot)
        assert write_conflicts(layout, [*writes, corrupted]) == [(victim, corrupted)]
        if victim.writer != write.writer:
            assert not layout.is_valid(corrupted)


@settings(fixed, max_examples=15)
@given(layers(), st.integers(0, 2**32))
def test_output_bits_do_not_depend_on_the_order(layer, order_seed):
    config, weights, x, idx, factors = layer
    runs = [TiledLayer(x, weights, config, idx, factors).run(np.random.default_rng(order_seed + i)) for i in range(2)]
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


@settings(fixed, max_examples=15)
@given(layers())
def test_no_task_runs_before_what_it_waits_for_or_twice(layer):
    config, weights, x, idx, factors = layer
    tiled = TiledLayer(x, weights, config, idx, factors)
    waiting = [task for task, needs in tiled.graph.items() if needs]
    for task in waiting[::7]:
        with pytest.raises(ValueError, match=r"must run after those it waits for, got .* before"):
            tiled.execute(task)
    with pytest.raises(ValueError, match="must be one of this layer's"):
        tiled.execute(Task(GEMM1, config.num_ranks))
    free = next(task for task, needs in tiled.graph.items() if not needs)
    tiled.execute(free)
    with pytest.raises(ValueError, match=r"must run once, got .* again"):
        tiled.execute(free)
    tiled.run(np.random.default_rng(0))
    assert all(np.isfinite(part.astype(np.float64)).all() for part in tiled.y), "run() goes on where execute() stopped"


@fixed
@given(layers())
def test_graph_says_what_each_kind_waits_for(layer):
    """From the definitions, without the packets' code: who needs whom, by sets of rows."""
    config, weights, x, idx, factors = layer
    tiled = TiledLayer(x, weights, config, idx, factors)
    per_rank = config.num_experts_per_rank
    gates = {rank: {t for t in tiled.graph if t.kind == GATE and t.rank == rank} for rank in range(config.num_ranks)}
    slots = [brute_slots(packet.topk_idx, config) for packet in tiled.packets]
    for task, listed in tiled.graph.items():
        needs = set(listed)
        assert len(listed) == len(needs)
        if task.kind == GATE:
            assert needs == set()
        if task.kind == DISPATCH:
            assert needs == gates[task.rank]
        if task.kind == GEMM0:
            assert needs == {Task(DISPATCH, task.peer, task.rank, task.expert)}
        columns = max(1, config.tile_n // 2) if config.gated else config.tile_n  # a gate column for each up
        if task.kind == GEMM1:
            tiles = -(-config.ffn // columns)
            assert needs == {task._replace(kind=GEMM0, n=n) for n in range(tiles)}
        if task.kind == SHARED0:
            assert needs == set()
        if task.kind == SHARED1:
            tiles = -(-config.shared_ffn // columns)
            assert needs == {task._replace(kind=SHARED0, n=n) for n in range(tiles)}
        if task.kind == COMBINE:
            tokens = range(task.m * config.token_block, min((task.m + 1) * config.token_block, len(x[task.rank])))
            sent = slots[task.rank]
            rows = {sent[t, j] for t in tokens for j in range(config.num_topk) if (t, j) in sent}
            sizes = np.bincount([e for e, _ in sent.values()], minlength=config.num_experts)
            height = [tile_height(size, config.tile_m_min, config.tile_m) for size in sizes]
            expected = {
                Task(GEMM1, e // per_rank, task.rank, e % per_rank, c // height[e], n)
                for e, c in rows
                for n in range(-(-config.hidden // config.tile_n))
            }
            shared = {
                Task(SHARED1, task.rank, m=t // config.tile_m, n=n)
                for t in (tokens if config.shared_ffn else ())
                for n in range(-(-config.hidden // config.tile_n))
            }
            assert needs == (expected or gates[task.rank]) | shared


def brute_slots(topk_idx, config):
    """(token, j) -> (expert, slot) of the pairs that are not dropped."""
    used, slots = [0] * config.num_experts, {}
    for t, row in enumerate(topk_idx.tolist()):
        for j, expert in enumerate(row):
            if 0 <= expert < config.num_experts and (config.capacity is None or used[expert] < config.capacity):
                slots[t, j] = (expert, used[expert])
                used[expert] += 1
    return slots


@fixed
@given(configs(), st.integers(0, 2**32), st.integers(0, 40))
def test_packets_equal_a_loop(config, seed, num_tokens):
    topk_idx = skewed_topk_idx(np.random.default_rng(seed), num_tokens, config)
    packets, slots = make_packets(topk_idx, config), brute_slots(topk_idx, config)
    found = {(t, j): (int(topk_idx[t, j]), int(c)) for (t, j), c in np.ndenumerate(packets.slot) if c >= 0}
    assert found == slots and packets.slot.min(initial=0) >= -1 and packets.slot.dtype == np.int32
    assert packets.dropped == ((topk_idx >= 0) & (topk_idx < config.num_experts)).sum() - len(slots)
    for expert in range(config.num_experts):
        in_order = sorted((c, t * config.num_topk + j) for (t, j), (e, c) in slots.items() if e == expert)
        assert packets.pairs(expert).tolist() == [pair for _, pair in in_order]
        assert packets.sent[expert] == len(in_order) and packets.counts[expert] == (topk_idx == expert).sum()


@settings(fixed, max_examples=200)
@given(configs(), st.data())
def test_bounds_hold_and_the_plan_counts_right(config, data):
    counts = data.draw(token_counts(config))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    packets = [make_packets(skewed_topk_idx(rng, count, config), config) for count in counts]
    sent = np.array([packet.sent for packet in packets]).reshape(config.num_ranks, config.num_ranks, -1)
    blocks = np.vectorize(lambda rows: num_row_blocks(rows, config.tile_m_min, config.tile_m))(sent)
    assert sent.sum(axis=(0, 2)).max() <= hidden_rows(config)
    assert blocks.sum(axis=(0, 2)).max() <= max_row_blocks(config)

    plan = make_plan(config, np.array([packet.counts for packet in packets]), counts)
    assert plan.real_rows == sent.sum()
    of_packets = [tile for rows in sent.ravel().tolist() for tile in row_tiles([rows], config)]
    assert plan.padded_rows == sum(tile.height for tile in of_packets) and plan.row_tiles == len(of_packets)
    tiles = [rows for rows in sent.reshape(config.num_ranks, -1).sum(axis=0).tolist() if rows]
    cut = [min(config.tile_m, rows - first) for rows in tiles for first in range(0, rows, config.tile_m)]
    packed = sum(tile_height(rows, config.tile_m_min, config.tile_m) for rows in cut)
    assert plan.packed_row_tiles == len(cut) <= plan.row_tiles  # of which heights that double may make more padding
    assert plan.packed_padded_share == pytest.approx(1 - sent.sum() / packed if packed else 0)
    assert plan.num_dropped == sum(packet.dropped for packet in packets) and plan.num_packets == (sent > 0).sum()
    assert plan.busiest_rank_flops <= plan.total_flops <= plan.padded_flops
    x = [np.zeros((count, config.hidden), config.numpy_dtype) for count in counts]
    factors = [np.ones(packet.topk_idx.shape) for packet in packets]
    tasks = TiledLayer(x, Weights.random(config), config, [p.topk_idx for p in packets], factors).graph
    assert plan.num_tasks == {name: sum(t.kind == kind for t in tasks) for kind, name in enumerate(KIND_NAMES)}
    per_rank = np.bincount([task.rank for task in tasks], minlength=config.num_ranks)
    assert per_rank.max() <= max_tasks(config) == plan.max_tasks
    json.dumps(dataclasses.asdict(plan))


@settings(fixed, max_examples=200)
@given(configs())
def test_the_bound_of_hidden_rows_is_reached(config):
    """All tokens of all ranks to one rank's experts, evenly."""
    here, slots = config.num_experts_per_rank, config.slots
    rows = min(config.num_tokens * min(config.num_topk, here), here * slots)
    assert hidden_rows(config) == config.num_ranks * rows


def test_plan_of_a_case_worked_out_by_hand():
    config = MoEConfig(
        num_ranks=2, num_tokens=9, hidden=10, ffn=6, num_experts=4, num_topk=2, gated=True, dtype="float16",
        capacity=5, tile_m=4, tile_m_min=2, tile_n=4, token_block=4,
    )  # fmt: skip
    counts = np.array([[9, 1, 4, 4], [0, 0, 3, 3]])  # sent: 5 1 4 4 and 0 0 3 3
    plan = make_plan(config, counts)
    assert plan.segment_bytes == {
        "dispatch": 400, "result": 400, "dispatch_flag": 64, "result_flag": 64, "control": 256,
    }  # fmt: skip
    assert plan.segment_total_bytes == 512 + 512 + 128 + 128 + 256
    assert plan.weight_bytes == 2 * 3 * 60 * 2 + 40 * 4
    assert (plan.num_packets, plan.num_dropped, plan.real_rows, plan.row_tiles) == (6, 4, 20, 7)
    assert plan.padded_rows == 6 + 2 + 4 + 4 + 4 + 4 and plan.padded_share == pytest.approx(4 / 24)
    tasks = {"GATE": 4, "DISPATCH": 8, "GEMM0": 21, "GEMM1": 21, "COMBINE": 4}
    assert plan.num_tasks == tasks | {"SHARED0": 0, "SHARED1": 0} and plan.shared_bytes == 0
    gate, row = 2 * 10 * 4, 2 * 3 * 60
    assert plan.total_flops == 12 * gate + 20 * row and plan.padded_flops == 12 * gate + 24 * row
    assert plan.busiest_rank_flops == 3 * gate + 14 * row
    assert (plan.packed_row_tiles, plan.packed_padded_share) == (2 + 1 + 2 + 2, 1 - 20 / 24)  # 5 1 7 7 rows
    assert plan.hidden_rows == 2 * 10 and plan.hidden_bytes == 20 * 6 * 2

    more = dataclasses.replace(config, shared_ffn=5, shared_gate=True, num_zero=3)
    shared = make_plan(more, counts - [[3, 0, 0, 0], [0, 0, 0, 0]], num_tokens=[9, 3])
    assert shared.weight_bytes == plan.weight_bytes + 3 * 50 * 2 + (3 + 1) * 10 * 4
    assert shared.shared_bytes == 9 * ((5 + 10) * 2 + 4)
    assert shared.total_bytes == plan.total_bytes + 2 * (3 * 50 * 2 + (3 + 1) * 10 * 4 + 9 * 34)
    # 9 tokens are 3 row tiles of 4, and 3 tokens are one; 5 columns are 3 tiles of 2, and 10 columns 3 tiles of 4
    assert shared.num_tasks == tasks | {"SHARED0": 12, "SHARED1": 12}
    assert shared.max_tasks == plan.max_tasks + 3 * (3 + 3)
    assert shared.total_flops == plan.total_flops + 12 * (2 * 10 * 4 + 2 * 3 * 50)


def test_plan_of_an_even_routing_and_bad_counts():
    config = MoEConfig(num_ranks=2, num_tokens=7, hidden=4, ffn=4, num_experts=4, num_topk=2)
    plan = make_plan(config)
    assert plan.real_rows == 28 and plan.busiest_rank_flops * 2 == plan.total_flops
    with pytest.raises(
        ValueError, match=r"routing_counts\[1\] must sum to num_topk=2 times at most num_tokens=7, got 3"
    ):
        make_plan(config, np.array([[2, 2, 0, 0], [1, 2, 0, 0]]))
    with pytest.raises(
        ValueError, match=r"routing_counts\[0\] must be in \[0, 2 tokens of that rank\], got \[3, 1, 0, 0\]"
    ):
        make_plan(config, np.array([[3, 1, 0, 0], [2, 2, 0, 0]]))
    plan = make_plan(config, np.array([[3, 0, 0, 0], [0, 0, 0, 0]]), num_tokens=[7, 2])  # 15 pairs chose nothing
    assert plan.real_rows == 3 and plan.num_tasks["GATE"] == 2 and plan.num_dropped == 0
    with pytest.raises(ValueError, match=r"routing_counts\[1\] must sum to num_topk=2 times at most .*, got 3"):
        make_plan(config, np.array([[0, 0, 0, 0], [1, 1, 1, 0]]), num_tokens=[7, 1])
    with pytest.raises(TypeError, match="routing_counts must have an integer dtype, got float64"):
        make_plan(config, np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"routing_counts must have shape \[2, 4\], got \[1, 4\]"):
        make_plan(config, np.zeros((1, 4), int))


def test_bad_tokens_and_shapes_in_tiles():
    config = MoEConfig(num_ranks=2, num_tokens=5, hidden=6, ffn=4, num_experts=4, num_topk=2, tile_n=4)
    weights, x = Weights.random(config), np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    x[1, 3, 0] = np.nan
    y, ref = TiledLayer(x, weights, config).run(np.random.default_rng(0)), moe_layer(x, weights, config)
    assert np.isnan(y[1][3]).all() and max_rel_error(y, ref) < tolerance(config)
    with pytest.raises(TypeError, match=r"x\[0\] must have config's dtype float32, got float64"):
        TiledLayer(x.astype(float), weights, config)
    with pytest.raises(ValueError, match="weights must have all num_experts=4, got 2"):
        TiledLayer(x, weights.shard(0, 2), config)


def test_a_block_that_lost_all_its_rows_waits_for_the_gates_and_gives_zeros():
    sizes = dict(num_ranks=1, num_tokens=3, hidden=4, ffn=4, num_experts=2, num_topk=1)
    config = MoEConfig(**sizes, capacity=1, token_block=1)
    x, idx = [np.ones((3, 4), np.float32)], [np.zeros((3, 1), int)]
    tiled = TiledLayer(x, Weights.random(config), config, idx, [np.ones((3, 1))])
    gates = [Task(GATE, 0, m=m) for m in range(3)]
    assert tiled.graph[Task(COMBINE, 0, m=0)] == [Task(GEMM1, 0)]
    assert tiled.graph[Task(COMBINE, 0, m=1)] == tiled.graph[Task(COMBINE, 0, m=2)] == gates
    y = tiled.run(np.random.default_rng(0))[0]
    assert y[0].any() and not y[1:].any()


def test_a_task_prints_its_indices():
    assert str(Task(COMBINE, 2, m=3)) == "COMBINE(rank=2, peer=0, expert=0, m=3, n=0)"
