"""The critical path of a simulation, where its time went, and what would make it shorter."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from graphs import graphs
from hypothesis import given

from flashmoe_numba import cli
from reference import load_preset
from sim.engine.graph import NONE, GraphBuilder
from sim.engine.kinds import BARRIER, DISPATCH, GEMM0, GEMM1, KIND_NAMES, LAUNCH, SEND
from sim.engine.plain import run
from sim.reading.explain import CATEGORIES, explain, held_by, lines, merged
from sim.simulation import simulate
from sim.studies import what_if
from sim.world.machine_files import load_hardware
from sim.world.precision import precision
from sim.world.routing import make_routing
from sim.world.world import World


def world(routing="uniform", hardware="4xH100", **sizes):
    machine = load_hardware(hardware)
    sizes = {"num_tokens": 512, "num_experts": 16, "capacity": None} | sizes
    config = load_preset("flashmoe-paper", num_ranks=machine.num_gpus, **sizes)
    routed = make_routing(routing, config)
    return World(config=config, hardware=machine, routing=routed, precision=precision("bfloat16"))


@given(graphs())
def test_the_path_fills_the_makespan_over_real_edges(graph):
    timeline = run(graph)
    found = explain(graph, timeline)
    assert tuple(found.totals_ns) == CATEGORIES
    assert sum(found.totals_ns.values()) == timeline.makespan_ns
    assert found.steps[0].ready_ns == 0
    assert graph.num_preds[found.steps[0].node] == 0
    assert found.steps[-1].done_ns == timeline.makespan_ns
    for before, after in pairwise(found.steps):
        assert after.node in graph.successors(before.node)
        assert after.ready_ns == before.done_ns


@given(graphs())
def test_each_step_is_what_its_node_did(graph):
    timeline = run(graph)
    server = graph.nodes["server"]
    for step in explain(graph, timeline).steps:
        times = (step.slot_ns, step.run_ns, step.transfer_ns, step.latency_ns)
        assert min(times) >= 0
        assert sum(times) == step.done_ns - step.ready_ns
        assert step.latency_ns == graph.nodes["latency_ns"][step.node]
        assert step.run_ns >= graph.nodes["duration_ns"][step.node]
        assert step.run_ns == graph.nodes["duration_ns"][step.node] or graph.nodes["streamed"][step.node]
        assert (step.transfer_ns > 0) == (graph.nodes["nbytes"][step.node] > 0)
        assert (step.freed_by == NONE) == (step.slot_ns == 0)
        if step.freed_by != NONE:
            assert server[timeline.run_node[step.freed_by]] == server[step.node]
            assert timeline.run_end_ns[step.freed_by] == timeline.run_start_ns[step.run]


@given(graphs())
def test_waits_are_behind_something_and_merging_loses_no_time(graph):
    timeline = run(graph)
    found = explain(graph, timeline)
    assert sum(found.behind.values()) == pytest.approx(found.totals_ns["waiting for a slot"])
    short = merged(graph, found.steps)
    assert sum(step.done_ns - step.ready_ns for step in short) == timeline.makespan_ns
    assert sum(step.count for step in short) == sum(step.done_ns > step.ready_ns for step in found.steps)
    for before, after in pairwise(short):
        ends = [[graph.nodes[name][step.node] for name in ("kind", "rank")] for step in (before, after)]
        assert ends[0] != ends[1]


@pytest.fixture
def by_hand():
    """LAUNCH 5; two GEMM0 of 10 and 7 compete for a slot; a DISPATCH of 8 bytes at 2 GB/s; a meeting; two SENDs."""
    builder = GraphBuilder()
    slot, out = builder.add_server("SM slots", 0, 1), builder.add_link("out", 0, 2.0)
    launch = builder.add(LAUNCH, 0, duration_ns=5)
    first = builder.add(GEMM1, 0, server=slot, duration_ns=10)
    second = builder.add(GEMM0, 0, server=slot, duration_ns=7)
    store = builder.add(DISPATCH, 0, server=slot, duration_ns=3, nbytes=8, egress=out, latency_ns=2, peer=1)
    met = builder.add(BARRIER, 0, duration_ns=4)
    sent = builder.add(SEND, 1, duration_ns=6)  # a copy engine's
    pushed = builder.add(SEND, 0, server=slot, duration_ns=9)
    edges = ((launch, first), (launch, second), (second, store), (store, met), (met, sent), (sent, pushed))
    for before, after in edges:
        builder.edge(before, after)
    return builder.build()


def test_a_path_by_hand(by_hand):
    found = explain(by_hand, run(by_hand))
    assert [KIND_NAMES[by_hand.nodes["kind"][step.node]] for step in found.steps] == [
        "LAUNCH", "GEMM0", "DISPATCH", "BARRIER", "SEND", "SEND",
    ]  # fmt: skip
    assert found.totals_ns == {
        "compute": 7, "waiting for a slot": 10, "transfer": 3 + 4 + 9, "latency": 2 + 6, "launch": 5, "barrier": 4,
    }  # fmt: skip
    assert found.behind == {"GEMM1": 10.0}
    text = "\n".join(lines(by_hand, found))
    assert "DISPATCH on rank 0, to rank 1" in text
    assert "behind GEMM1 100%" in text


def test_who_held_the_server_is_by_slot_time():
    """Of three slots two are GEMM1's for 10 ns and one is GEMM0's for 4 and another 4: the last waits for 8."""
    builder = GraphBuilder()
    slots = builder.add_server("SM slots", 0, 3)
    builder.add(GEMM1, 0, server=slots, duration_ns=10, count=2)
    builder.add(GEMM0, 0, server=slots, duration_ns=4, count=2)
    builder.add(DISPATCH, 0, server=slots, duration_ns=9)
    graph = builder.build()
    timeline = run(graph)
    (step,) = explain(graph, timeline).steps
    shares = held_by(graph, timeline, step)
    assert (step.slot_ns, shares[GEMM1], shares[GEMM0]) == (8, 16 / 24, 8 / 24)


def test_a_slot_is_freed_on_its_own_server():
    builder = GraphBuilder()
    other, mine = (builder.add_server(name, 0, 1) for name in ("other", "mine"))
    builder.add(GEMM0, 0, server=[other, mine, mine], duration_ns=[5, 5, 9])
    timeline = run(graph := builder.build())
    (step,) = explain(graph, timeline).steps
    assert timeline.run_node[step.freed_by] == 1


def test_an_empty_graph_has_an_empty_path():
    graph = GraphBuilder().build()
    assert explain(graph, run(graph)).totals_ns == dict.fromkeys(CATEGORIES, 0)


@pytest.mark.parametrize("routing", ["hot-rank", "even"])
def test_gains_reproduce_when_simulated_again(routing):
    simulation = simulate("flashmoe", world(routing))
    candidates = what_if.changes(simulation)
    found = what_if.gains(simulation, candidates)
    assert found, "twice the SMs would help"
    for gain in found:
        again = simulate("flashmoe", gain.change.world, gain.change.knobs)
        assert again.latency_us == gain.latency_us
        assert gain.gain == pytest.approx(1 - gain.latency_us / simulation.latency_us)
    assert [gain.gain for gain in found] == sorted((gain.gain for gain in found), reverse=True)
    assert found[0].gain > what_if.WORTH
    shown = "\n".join(what_if.gain_lines(found))
    assert all(
        (gain.change.name in shown) == (gain.gain < 0) for gain in found if gain.change.faster and gain.gain <= 0
    )


def test_a_faster_part_that_slows_the_whole_is_said():
    (change, *_) = what_if.changes(simulate("flashmoe", world()))
    slower = what_if.Gain(change=change, latency_us=101.0, gain=-0.01)
    knob = replace(slower, change=replace(change, faster=False, name="knob"))
    assert list(what_if.gain_lines([knob, slower]))[1:] == [
        "slower with a faster part, as list schedules can be: tasks come in another order",
        "  +1.0% to 101.0 us  NVLink twice as fast",
    ]


def test_each_change_is_one_change():
    simulation = simulate("flashmoe", world("zipf:1", "2x2xH100"))
    found = what_if.changes(simulation)
    names = [change.name for change in found]
    assert len(names) == len(set(names))
    assert {"NICs twice as fast", "knob tile_m = 64", "knob tile_m = 256", "knob ladder = False", "even routing",
            "knob packing = per_expert", "experts placed by load, 4 copies of busy ones"} <= {*names}  # fmt: skip
    for change in found:
        parts = [change.knobs != simulation.knobs]
        parts += [getattr(change.world, part) != getattr(simulation.world, part) for part in ("hardware", "routing")]
        assert sum(parts) == 1, change.name
        assert change.world.config == simulation.world.config


def test_work_that_is_left_out_is_no_suggestion():
    names = " ".join(change.name for change in what_if.changes(simulate("flashmoe", world())))
    assert "gate" not in names
    assert "rate" not in names


def test_a_routing_that_drops_fewer_rows_says_how_many_more_it_computes():
    simulation = simulate("flashmoe", world("hot", capacity=64))
    more = simulation.world.routing.dropped
    assert more > 0
    assert f"even routing, with +{more:,} rows" in [change.name for change in what_if.changes(simulation)]


def test_what_does_not_fit_is_left_out():
    simulation = simulate("flashmoe", world(num_experts=4, num_topk=4))
    tight = simulation.world.memory_bytes / 1e9
    machine = replace(simulation.world.hardware, hbm_gb=tight)
    full = replace(simulation, world=replace(simulation.world, hardware=machine))
    names = [change.name for change in what_if.changes(full)]
    assert "experts placed by load, 4 copies of busy ones" not in names
    assert "experts placed by load" in names
    small = simulate("flashmoe", world(), replace(simulation.knobs, tile_m=1))
    assert "knob tile_m = 0" not in [change.name for change in what_if.changes(small)]


def test_a_bottleneck_is_found():
    machine = replace(load_hardware("4xH100"), nvlink_gbps=5.0)
    simulation = simulate("flashmoe", replace(world(num_tokens=2048), hardware=machine))
    found = what_if.gains(simulation, what_if.changes(simulation))
    assert found[0].change.name == "NVLink twice as fast"
    totals = explain(simulation.graph, simulation.timeline).totals_ns
    assert max(totals, key=totals.get) == "transfer"
    assert "NVLink" in "\n".join(what_if.gain_lines(found))


def test_a_gain_below_a_percent_is_none():
    simulation = simulate("flashmoe", world())
    (change, *_) = what_if.changes(simulation)
    small = what_if.Gain(change=change, latency_us=99.5, gain=0.005)
    assert list(what_if.gain_lines([small])) == ["none of the changes that were simulated helps by more than 1%"]
    large = [replace(small, gain=gain) for gain in np.linspace(0.9, 0.1, 9)]
    assert len(list(what_if.gain_lines(large))) == 1 + 3


# ---- the command

FLAGS = ["explain", "--preset", "laptop-text", "--hardware", "4xH100", "--tokens", "64"]


def test_the_command_explains_what_sim_simulates(capsys):
    flags = ["--policy", "flashmoe", "--routing", "hot", "--set", "tile_m=64"]
    assert cli.main([*FLAGS, *flags]) == 0
    said, errors = capsys.readouterr()
    assert cli.main(["sim", *FLAGS[1:], *flags, "--json", "-"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert "flashmoe, simulated on 4xH100: laptop-text, 32 experts, top-2, 64 tokens on each of 4 ranks" in said
    assert f"the simulated {report['latency_us']:.1f} us" in said
    totals = re.findall(r"^  (?:" + "|".join(CATEGORIES) + r") +([\d.]+) us", said, re.MULTILINE)
    assert sum(map(float, totals)) == pytest.approx(report["latency_us"], abs=0.05 * len(CATEGORIES))
    assert "changes that would help most" in said
    assert errors == "", "progress is drawn though stderr is no terminal"


def test_the_command_says_what_was_computed(capsys):
    """All first choices are expert 0, which has room for 16 rows of each rank: 4 * 48 of 256 are dropped."""
    flags = ["explain", "--preset", "laptop-text", "--hardware", "4xH100", "--tokens", "64", "--topk", "1"]
    for command in ([], ["--against", "bulk"]):
        assert cli.main([*flags, "--routing", "hot", "--capacity", "16", *command]) == 0
        line = "64 rows, 192 dropped, capacity 16 rows; busiest rank 4.00 of the mean, busiest expert 32.00"
        assert capsys.readouterr().out.splitlines().count(line) == 1 + bool(command)
    assert cli.main([*flags, "--routing", "even"]) == 0
    assert "\n256 rows, no capacity; busiest rank 1.00 of the mean, busiest expert 1.00\n" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "message"), [
    (["--policy", "all"], "argument --policy: policy must be one of flashmoe, "),
    (["--policy", "flashmoe,bulk"], "argument --policy: policy must be one of flashmoe, "),
    (["--tokens", "64,128"], "argument --tokens: must be an integer >= 1, got '64,128'"),
    (["--hardware", "8xV100"], "argument --hardware: hardware must be a GPU kind"),
    (["--ranks", "3"], "--experts must be a multiple of --ranks=3, got 32"),
    (["--set", "speed=1"], "argument --set: no knob 'speed' in flashmoe"),
    (["--json", "-"], "unrecognized arguments: --json -"),
])  # fmt: skip
def test_bad_flags_are_one_line(capsys, flags, message):
    assert cli.main([*FLAGS, *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"flashmoe explain: error: {message}")
