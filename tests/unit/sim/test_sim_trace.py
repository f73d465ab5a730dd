"""Traces of simulations: every task once, one at a time in a lane, in a file that the kernel's can stand beside."""

import json
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from graphs import simulations
from hypothesis import given
from policy_worlds import odd_worlds, small_world

from flashmoe_numba.seeing.trace import chrome_trace
from reference import traces
from reference.traces import TRACE_KIND_NAMES, Slice
from sim.engine import kinds
from sim.policies import POLICY_NAMES, make_knobs
from sim.reading import lanes
from sim.reading.lanes import make_trace
from sim.reading.trace import note, write_chrome_trace
from sim.simulation import simulate

ODD_WORLDS = odd_worlds()


@pytest.fixture(scope="module")
def simulation():
    return simulate("flashmoe", small_world())


def written(simulation, folder, ranks=None):
    """The file of a simulation, read back."""
    write_chrome_trace(simulation, str(folder / "trace.json"), ranks)
    return json.loads((folder / "trace.json").read_text())


def slices_of(events):
    return [event for event in events if event["ph"] == "X"]


def check_lanes(simulation, made):
    """Slices of a lane are disjoint, and a server has no more lanes than slots."""
    lanes = defaultdict(list)
    for task in made.slices:
        lanes[task.rank, task.lane].append((task.start_ns, task.end_ns))
    for spans in lanes.values():
        for (_, end), (start, _) in pairwise(spans):
            assert end <= start
    assert made.lanes.keys() == lanes.keys()
    slots = Counter()
    for server in simulation.graph.servers:
        slots[server.rank] += server.slots
    for (rank, lane), name in made.lanes.items():
        assert name.startswith("no server") == (lane >= slots[rank])


@given(simulation=simulations())
def test_slices_of_a_lane_are_disjoint(simulation):
    made = make_trace(simulation)
    check_lanes(simulation, made)
    nodes = simulation.graph.nodes
    expected = int(nodes["count"][nodes["kind"] != kinds.JOIN].sum())
    assert len(made.slices) == expected
    assert [task.start_ns for task in made.slices] == sorted(task.start_ns for task in made.slices)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("name", ["hot", "two nodes", "one rank"])
def test_slices_of_schedules(policy, name):
    simulation = simulate(policy, ODD_WORLDS[name])
    made = make_trace(simulation)
    check_lanes(simulation, made)
    nodes = simulation.graph.nodes
    tasks = Counter()
    for kind, number in zip(nodes["kind"].tolist(), nodes["count"].tolist(), strict=True):
        tasks[kind] += number
    del tasks[kinds.JOIN]
    assert Counter(task.kind for task in made.slices) == tasks


def test_the_tasks_of_a_node_are_numbered_in_the_order_in_which_they_start():
    indices = lanes.index_in_node(np.array([7, 3, 7, 7, 3]), np.array([2, 1, 1, 4, 2]))
    assert indices.tolist() == [0, 0, 2, 3, 1]


def test_a_packets_tiles_have_all_columns(simulation):
    made = make_trace(simulation)
    tiles = defaultdict(list)
    for task in made.slices:
        if task.kind == kinds.GEMM1:
            tiles[task[:1] + task[2:6]].append(task.n)
    assert tiles
    for columns in tiles.values():
        assert sorted(columns) == [0, 1]  # 192 columns, 128 to a tile


def test_the_file_says_that_it_is_simulated_and_where(simulation, tmp_path):
    file = written(simulation, tmp_path)
    assert file["otherData"]["simulated"] is True
    number = len(slices_of(file["traceEvents"]))
    assert file["otherData"]["note"] == (f"simulated flashmoe on 4xH100: {number:,} of {number:,} tasks, 4 of 4 ranks")
    names = {event["args"]["name"] for event in file["traceEvents"] if event["name"] == "process_name"}
    assert names == {f"rank {rank}, simulated 4xH100" for rank in range(4)}


def test_slices_look_like_those_of_the_kernel(simulation, tmp_path):
    ours = slices_of(written(simulation, tmp_path)["traceEvents"])
    (theirs,) = slices_of(chrome_trace([Slice(0, 0, kinds.GEMM0, 0, 0, 0, 0, 0, 1)], 1))
    for task in ours:
        assert task.keys() == theirs.keys()
        assert task["args"].keys() == theirs["args"].keys()
    assert kinds.KIND_NAMES[: len(TRACE_KIND_NAMES)] == TRACE_KIND_NAMES
    lanes = {event["args"]["name"]: event["tid"] for event in _lane_names(simulation, tmp_path)}
    assert lanes["OS block"] == lanes["SM slots 0"] + slots_of(simulation)  # after the processors, as in the kernel's


def slots_of(simulation):
    """Slots of one rank's multiprocessors."""
    (slots,) = {server.slots for server in simulation.graph.servers if server.name == "SM slots"}
    return slots


def _lane_names(simulation, folder):
    events = written(simulation, folder)["traceEvents"]
    return [event for event in events if event["name"] == "thread_name" and event["pid"] == 0]


def test_flows_lead_from_each_packet_to_its_first_tile(simulation, tmp_path):
    events = written(simulation, tmp_path)["traceEvents"]
    slices = {(e["pid"], e["tid"], e["ts"]): e for e in slices_of(events)}
    starts = {e["id"]: slices[e["pid"], e["tid"], e["ts"]] for e in events if e["ph"] == "s"}
    ends = {e["id"]: slices[e["pid"], e["tid"], e["ts"]] for e in events if e["ph"] == "f"}
    assert starts.keys() == ends.keys()
    assert len(starts) == (simulation.world.routing.counts > 0).sum()
    for number, sent in starts.items():
        used = ends[number]
        assert (sent["name"], used["name"]) == ("DISPATCH", "GEMM0")
        assert (sent["args"]["peer"], sent["args"]["expert"]) == (used["pid"], used["args"]["expert"])
        assert sent["ts"] + sent["dur"] <= used["ts"]


def test_a_flow_ends_at_the_first_tile_to_start(tmp_path):
    knobs = make_knobs("flashmoe", {"tile_m": 16, "blocks_per_sm": 1, "packing": "per_source"})
    simulation = simulate("flashmoe", small_world(num_tokens=2000), knobs)
    first = {}
    for task in make_trace(simulation).slices:
        if task.kind == kinds.GEMM0:
            first.setdefault((task.peer, task.rank, task.expert), task.start_ns / 1000)
    events = written(simulation, tmp_path)["traceEvents"]
    slices = {(e["pid"], e["tid"], e["ts"]): e for e in slices_of(events)}
    ends = [slices[e["pid"], e["tid"], e["ts"]] for e in events if e["ph"] == "f"]
    assert {(e["args"]["peer"], e["pid"], e["args"]["expert"]): e["ts"] for e in ends} == first


def test_flows_are_capped(simulation, tmp_path, monkeypatch):
    monkeypatch.setattr(traces, "MAX_FLOWS", 3)
    events = written(simulation, tmp_path)["traceEvents"]
    assert len([event for event in events if event["ph"] == "s"]) == 3


def test_counters_end_at_zero_and_integrate_to_what_was_done(simulation, tmp_path):
    counters = defaultdict(list)
    for event in written(simulation, tmp_path)["traceEvents"]:
        if event["ph"] == "C":
            ((_, level),) = event["args"].items()
            counters[event["pid"], event["name"]].append((event["ts"], level))
    held = sum(
        level * (after - now)
        for (_, name), steps in counters.items()
        if name == "SM slots: slots held"
        for (now, level), (after, _) in pairwise([*steps, (simulation.latency_us, 0)])
    )
    slices = slices_of(written(simulation, tmp_path)["traceEvents"])
    assert held == pytest.approx(sum(task["dur"] for task in slices if task["tid"] < slots_of(simulation)))
    under_way = [name for _, name in counters if "bytes under way" in name]
    assert Counter(under_way) == {f"NVLink {way}: bytes under way": 4 for way in ("in", "out")}
    assert all(level >= 0 for steps in counters.values() for _, level in steps)


def test_only_the_ranks_that_were_chosen(simulation, tmp_path):
    events = written(simulation, tmp_path, ranks=[2, 0])["traceEvents"]
    assert {event["pid"] for event in events} == {0, 2}
    all_ranks = slices_of(written(simulation, tmp_path)["traceEvents"])
    mine = [task for task in all_ranks if task["pid"] in (0, 2)]
    assert slices_of(events) == mine


def test_ranks_that_are_not_there(simulation, tmp_path):
    with pytest.raises(ValueError, match=r"ranks must be in \[0, 4\), got 4"):
        written(simulation, tmp_path, ranks=[4])


def test_what_does_not_fit_is_left_out_rank_by_rank(simulation, monkeypatch):
    whole = make_trace(simulation)
    per_rank = Counter(task.rank for task in whole.slices)
    monkeypatch.setattr(lanes, "MAX_SLICES", per_rank[0] + per_rank[1] + 3)
    some = make_trace(simulation)
    assert some.ranks == [0, 1]
    assert len(some.slices) == per_rank[0] + per_rank[1]
    assert note(simulation, some).endswith("2 of 4 ranks")


def test_a_rank_that_does_not_fit_is_cut_off(simulation, monkeypatch, tmp_path):
    monkeypatch.setattr(lanes, "MAX_SLICES", 20)
    made = make_trace(simulation)
    assert made.ranks == [0]
    assert 0 < len(made.slices) <= 20
    assert all(task.start_ns <= made.until_ns for task in made.slices)
    assert f"cut off at {made.until_ns / 1000:g} us" in note(simulation, made)
    counters = [event for event in written(simulation, tmp_path)["traceEvents"] if event["ph"] == "C"]
    assert max(event["ts"] for event in counters) < made.until_ns / 1000


def test_tiles_of_one_source_name_it_as_the_kernel_does():
    simulation = simulate("flashmoe", small_world(), make_knobs("flashmoe", {"packing": "per_source"}))
    tiles = [task for task in make_trace(simulation).slices if task.kind == kinds.GEMM0 and task.m == task.n == 0]
    packets = {(task.peer, 2 * task.rank + task.expert) for task in tiles}  # two experts to a rank
    assert packets == set(zip(*(index.tolist() for index in np.nonzero(simulation.world.routing.counts)), strict=True))
