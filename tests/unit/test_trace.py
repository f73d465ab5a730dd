"""Records of a call: every task once, in an order that its dependencies allow, one at a time in a lane."""

import json
from itertools import pairwise

import numpy as np
import pytest

from flashmoe_numba import FlashMoE
from flashmoe_numba.seeing.plots import plot_timeline
from flashmoe_numba.seeing.trace import chrome_trace, decode, write_chrome_trace
from reference import DISPATCH, GATE, GEMM0, Task, Weights, load_preset, make_packets, make_workload, task_graph, traces
from reference.task_kinds import RECEIVE
from reference.traces import TRACE_KIND_NAMES, Slice

NUM_PROCESSORS = 2


@pytest.fixture(scope="module")
def traced():
    """(records of the second of two calls, its routing, its row tiles, config): with more tokens than the first."""
    config = load_preset("laptop-tiny", capacity=9)
    x = make_workload("uniform", config, [12, 0, 7, 11]).x
    with FlashMoE(config, Weights.random(config), num_processors=NUM_PROCESSORS, trace=True) as layer:
        layer([part[:3] for part in x])
        layer(x)
        return decode(layer.traces), layer.routing, layer.row_tiles, config


def as_task(record):
    return Task(record.kind, record.rank, record.peer, record.expert, record.m, record.n)


def test_every_task_of_the_graph_is_recorded_once(traced):
    records, routing, row_tiles, config = traced
    tiles = [of_expert for of_rank in row_tiles for of_expert in of_rank]
    graph = task_graph([make_packets(part.topk_idx, config) for part in routing], config, tiles)
    tasks = [as_task(record) for record in records if record.kind != RECEIVE]
    tasks.remove(Task(GATE, rank=1))  # of a rank without tokens: somebody has to start its empty packets
    assert sorted(tasks) == sorted(graph)


def test_a_layer_that_keeps_no_records_has_no_room_for_any():
    config = load_preset("laptop-tiny")
    with FlashMoE(config, Weights.random(config), num_processors=NUM_PROCESSORS) as layer:
        layer(make_workload("uniform", config).x)
        assert {(lane, buffer.size) for lane, buffer in layer.traces.items()} == {
            ((rank, block), 0) for rank in range(config.num_ranks) for block in range(NUM_PROCESSORS + 1)
        }


def test_a_task_begins_after_all_that_it_waits_for_began(traced):
    records, routing, row_tiles, config = traced
    tiles = [of_expert for of_rank in row_tiles for of_expert in of_rank]
    graph = task_graph([make_packets(part.topk_idx, config) for part in routing], config, tiles)
    start = {as_task(record): record.start_ns for record in records if record.kind != RECEIVE}
    for task, needs in graph.items():
        for need in needs:
            assert start[need] < start[task], f"{task} began before {need}"


def test_slices_of_a_lane_are_disjoint(traced):
    records, _, _, config = traced
    lanes = {(rank, block) for rank in range(config.num_ranks) for block in range(NUM_PROCESSORS + 1)}
    assert {(record.rank, record.lane) for record in records} <= lanes
    for before, after in pairwise(records):
        assert before.start_ns <= before.end_ns
        if (before.rank, before.lane) == (after.rank, after.lane):
            assert before.end_ns <= after.start_ns, f"{before} overlaps {after}"


def test_the_os_block_receives_every_packet_with_its_rows(traced):
    records, routing, _, config = traced
    sent = [make_packets(part.topk_idx, config).sent for part in routing]
    received = {(r.peer, r.rank, r.expert): r.n for r in records if r.kind == RECEIVE}
    here = config.num_experts_per_rank
    assert len(received) == config.num_ranks * config.num_experts
    for (source, owner, expert), rows in received.items():
        assert rows == sent[source][owner * here + expert]


def test_flows_join_the_dispatch_of_a_packet_and_its_first_gemm(traced):
    records, routing, row_tiles, config = traced
    events = chrome_trace(records, NUM_PROCESSORS)
    slices = {(e["pid"], e["tid"], e["ts"]): e for e in events if e["ph"] == "X"}
    starts = {e["id"]: slices[e["pid"], e["tid"], e["ts"]] for e in events if e["ph"] == "s"}
    ends = {e["id"]: slices[e["pid"], e["tid"], e["ts"]] for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == sum((make_packets(part.topk_idx, config).sent > 0).sum() for part in routing)
    for number, sent in starts.items():
        used = ends[number]
        assert (sent["name"], used["name"]) == ("DISPATCH", "GEMM0")
        assert (sent["args"]["peer"], sent["args"]["expert"]) == (used["pid"], used["args"]["expert"])
        of_expert = row_tiles[used["pid"]][used["args"]["expert"]]
        [tile] = [tile for tile in of_expert if (tile.peer, tile.m) == (used["args"]["peer"], used["args"]["m"])]
        assert sent["pid"] in {run.source for run in tile.runs}
        assert sent["ts"] < used["ts"]


def test_a_packet_in_which_no_tile_begins_flows_into_the_last_that_began():
    """Rows of sources 0 and 2 share a tile; source 1's come next and begin two; source 3's end the second."""
    arrived = [Slice(0, 1, RECEIVE, peer, 0, 0, 2, at, at + 1) for at, peer in enumerate((0, 2, 1, 3))]
    sent = [Slice(peer, 0, DISPATCH, 0, 0, 0, 0, -9 + peer, -8 + peer) for peer in range(4)]
    names = (0, 0), (1, 0), (1, 1)
    tiles = [Slice(0, 0, GEMM0, peer, 0, m, 0, 10 + at, 11 + at) for at, (peer, m) in enumerate(names)]
    ends = [event["ts"] for event in chrome_trace(sent + arrived + tiles, 1) if event["ph"] == "f"]
    assert ends == [0.019, 0.020, 0.019, 0.021]  # of sources 0 to 3, from the first slice on


def test_flows_are_capped_to_the_earliest(monkeypatch):
    records = [Slice(0, 0, DISPATCH, 1, e, 0, 0, 10 * e, 10 * e + 5) for e in range(5)]
    records += [Slice(1, 1, RECEIVE, 0, e, 0, 1, 10 * e + 6, 10 * e + 7) for e in range(5)]
    records += [Slice(1, 0, GEMM0, 0, e, 0, 0, 100 + 10 * e, 105 + 10 * e) for e in range(5)]
    monkeypatch.setattr(traces, "MAX_FLOWS", 3)
    starts = [event for event in chrome_trace(records, 1) if event["ph"] == "s"]
    assert [event["ts"] for event in starts] == [0, 0.01, 0.02]


def test_chrome_events_are_microseconds_with_names_for_lanes():
    gemm = Slice(1, 0, 2, 3, 4, 5, 6, 1_002_500, 1_003_000)
    receive = Slice(1, 2, 5, 0, 0, 0, 9, 1_000_000, 1_000_100)
    events = chrome_trace([gemm, receive], 2)
    (task,) = [event for event in events if event.get("name") == "GEMM0"]
    assert (task["ph"], task["pid"], task["tid"], task["ts"], task["dur"]) == ("X", 1, 0, 2.5, 0.5)
    assert task["args"] == {"peer": 3, "expert": 4, "m": 5, "n": 6}
    names = {(e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["name"].endswith("_name")}
    assert names == {(1, None): "rank 1", (1, 0): "processor 0", (1, 2): "OS block"}


def test_the_file_is_json_and_the_same_whatever_the_order_of_lanes(traced, tmp_path):
    buffers = {(1, 0): np.arange(24), (0, 1): np.arange(24) + 50}
    for buffer in buffers.values():
        buffer[0], buffer[8::8] = 2, 1
    for number, order in enumerate((buffers, dict(reversed(buffers.items())))):
        write_chrome_trace(decode(order), 1, tmp_path / str(number))
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    assert len(json.loads((tmp_path / "0").read_text())["traceEvents"]) == 2 * 2 + 2 * 2 + 4


def test_a_buffer_that_was_too_small_is_not_half_a_trace():
    with pytest.raises(ValueError, match="a trace buffer for 2 records must hold 3"):
        decode({(0, 0): np.full(24, 3)})


def test_a_call_without_tasks_has_a_file_and_a_picture(tmp_path):
    write_chrome_trace([], 1, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == []
    plot_timeline([], 1, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_the_picture_has_a_box_for_every_record(traced, tmp_path, figures):
    plot_timeline(traced[0], NUM_PROCESSORS, tmp_path / "timeline.png", "2 ranks")
    (axes,) = figures[0].axes
    assert axes.get_title() == "2 ranks"
    labels = [text.get_text().upper() for text in figures[0].legends[0].get_texts()]
    assert set(labels) == {TRACE_KIND_NAMES[task.kind] for task in traced[0]}
    assert sum(len(collection.get_paths()) for collection in axes.collections) == len(traced[0])
    assert axes.get_yticklabels()[0].get_text() == "rank 0  processor 0"
