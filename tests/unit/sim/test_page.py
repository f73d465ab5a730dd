"""What a page holds of a simulation: all time and bytes are in its bands, its size is bounded, floors are floors."""

import json
import re

import numpy as np
import pytest
from graphs import simulation_of, simulations
from hypothesis import given
from hypothesis import strategies as st
from policy_worlds import demanded_link_bytes, odd_worlds, small_world

import sim
from sim.drafting.roof import operations
from sim.engine import kinds
from sim.engine.graph import NONE, GraphBuilder
from sim.policies import POLICY_NAMES, make_knobs
from sim.reading.bands import BESIDE, bands, each_rank, server_bands
from sim.reading.explain import explain
from sim.reading.page import gather as gathering
from sim.reading.page.fold import series
from sim.reading.page.gather import gather
from sim.reading.page.roofline import multiplied
from sim.reading.page.write import join, page
from sim.reading.steps import levels
from sim.simulation import simulate

ODD_WORLDS = odd_worlds()
LEVELS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 5)), max_size=12)


def area(found, horizon):
    """Level times nanoseconds of a series, as the page reads it."""
    starts = np.cumsum(found["at"]) if "at" in found else np.arange(len(found["level"])) * found["every"]
    return float((np.array(found["level"]) * np.diff([*starts, horizon])).sum())


@given(intervals=LEVELS, most=st.integers(1, 30))
def test_a_series_is_exact_or_keeps_the_area(intervals, most):
    one, other, weight = np.array(intervals, np.int64).reshape(-1, 3).T
    start, end = np.minimum(one, other), np.maximum(one, other)
    expected = np.zeros(20)
    for begin, until, height in zip(start, end, weight, strict=True):
        expected[begin:until] += height
    steps = levels(np.ones(len(one), np.int64), start, end, weight, 2, 20)
    found = series(steps, 1, 0.5, most)
    assert len(found["level"]) <= most
    changes = 1 + np.count_nonzero(np.diff(expected))
    assert ("at" in found) == (changes <= most)
    if "at" in found:
        counted = np.append(np.diff(np.cumsum(found["at"])), 20 - sum(found["at"]))
        np.testing.assert_array_equal(np.repeat(found["level"], counted), expected / 2)
    assert area(found, 20) == pytest.approx(expected.sum() / 2, abs=20 * 0.0005)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("name", ["zipf:1.2", "two nodes", "one rank"])
def test_bands_hold_all_time_of_all_tasks(policy, name):
    simulation = simulate(policy, ODD_WORLDS[name])
    graph, time, num_ranks = simulation.graph, simulation.timeline, simulation.world.num_ranks
    expected = {}
    columns = (time.run_node, time.run_count, time.run_start_ns, time.run_end_ns, time.run_arrive_ns)
    for node, count, start, end, arrive in zip(*(column.tolist() for column in columns), strict=True):
        kind, server = graph.nodes["kind"][node], graph.nodes["server"][node]
        on = BESIDE if server == NONE else graph.servers[server].name
        on = on if on in ("host", "OS block", BESIDE) else "SM slots"
        rank = graph.nodes["rank"][node] if server == NONE else graph.servers[server].rank
        if kind != kinds.JOIN:
            key = (on, kinds.KIND_NAMES[kind], rank)
            expected[key] = expected.get(key, 0) + count * ((arrive if server == NONE else end) - start)
    found = {}
    for band in server_bands(simulation, each_rank(range(num_ranks), num_ranks)):
        for part, steps in band.parts.items():
            held = np.bincount(steps.group, (steps.right - steps.left) * steps.level, num_ranks)
            found |= {(band.name, part, rank): time for rank, time in enumerate(held.tolist())}
    assert {key: time for key, time in found.items() if time} == {key: time for key, time in expected.items() if time}


@given(simulation=simulations())
def test_links_carry_all_their_bytes_in_their_bands(simulation):
    graph, horizon = simulation.graph, max(1, simulation.timeline.makespan_ns)
    num_ranks = simulation.world.num_ranks
    carried = np.zeros((len(graph.links), num_ranks))
    for band in bands(simulation, each_rank(range(num_ranks), num_ranks)):
        for steps in band.parts.values():
            if band.name.startswith("link"):
                share = np.bincount(steps.group, (steps.right - steps.left) * steps.level, num_ranks)
                carried[int(band.name.split()[1])] += share
    for link, shares, nbytes in zip(graph.links, carried, simulation.timeline.link_bytes.tolist(), strict=True):
        assert shares.sum() == shares[link.rank]
        assert shares.sum() * link.gbps == pytest.approx(nbytes, abs=1e-5 * horizon * (1 + nbytes))


def test_a_link_is_used_from_the_tasks_end_until_its_bytes_are_there():
    builder = GraphBuilder()
    link = builder.add_link("link", 0, 2.0, 1.0)
    server = builder.add_server("SM slots", 0, 1)
    builder.add(kinds.SEND, 0, server=server, duration_ns=10, nbytes=30, egress=link, latency_ns=5)
    (slots, band) = bands(simulation_of(builder.build(), 1), np.zeros(1, np.int64))
    ((name, steps),) = band.parts.items()
    assert (slots.name, band.name, name) == ("SM slots", "link", "link")
    assert list(zip(steps.left, steps.right, steps.level, strict=True)) == [(0, 10, 0), (10, 40, 0.5), (40, 45, 0)]


def held_by_rank(simulation, group, num_groups):
    """Level times nanoseconds of each group, by band and part."""
    return {
        (band.name, part): np.bincount(steps.group, (steps.right - steps.left) * steps.level, num_groups)
        for band in bands(simulation, np.asarray(group))
        for part, steps in band.parts.items()
    }


def test_chosen_ranks_and_the_sum_of_all_are_the_same_bands():
    simulation = simulate("comet", small_world())
    whole = held_by_rank(simulation, each_rank(range(4), 4), 4)
    chosen = held_by_rank(simulation, each_rank([3, 1], 4), 2)
    summed = held_by_rank(simulation, [0, 0, 0, 0], 1)
    assert whole.keys() == summed.keys() > {("SM slots", "GEMM0"), ("NVLink in", "NVLink in")}
    for part, held in whole.items():
        np.testing.assert_allclose(chosen.get(part, np.zeros(2)), held[[3, 1]])
        np.testing.assert_allclose(summed[part], held.sum())


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("name", ODD_WORLDS)
def test_every_schedule_of_every_world_is_gathered(policy, name):
    world = ODD_WORLDS[name]
    simulation = simulate(policy, world)
    found = json.loads(json.dumps(gather(simulation), allow_nan=False))
    mean, *ranks = found["lanes"]
    assert len(ranks) == (world.num_ranks if world.num_ranks > 1 else 0)
    assert found["notes"] == []
    for floor in found["roofline"]["floors_us"].values():
        assert floor <= found["latency_us"]
    totals = explain(simulation.graph, simulation.timeline).totals_ns
    horizon = found["horizon_ns"]
    spent = [{name: area(part, horizon) for name, part in lane["path"].items()} for lane in found["lanes"]]
    assert spent[0] == {name: time for name, time in totals.items() if time}
    if ranks:  # each step is on one of them
        assert spent[0] == {name: sum(lane.get(name, 0) for lane in spent[1:]) for name in spent[0]}
    assert sum(found["path"]["totals_us"].values()) == pytest.approx(found["latency_us"])
    assert all(step["to_us"] > step["from_us"] for step in found["path"]["longest"])
    for band in mean["bands"]:
        for part in band["parts"].values():
            assert all(level >= 0 for level in part["level"])


def test_links_are_those_of_the_routing():
    world = small_world(hidden=192)
    simulation = simulate("flashmoe", world)
    found = {link["name"]: link for link in gather(simulation)["links"]}
    out, into = demanded_link_bytes(world, 192 * 2, 192 * 2)
    assert found.keys() == {"NVLink out", "NVLink in"}
    for name, nbytes in (("NVLink out", out), ("NVLink in", into)):
        assert found[name]["bytes_max"] == nbytes.max()
        assert found[name]["bytes_mean"] == pytest.approx(nbytes.mean())
        assert found[name]["gbps"] == world.hardware.nvlink_gbps
        carried = found[name]["bytes_max"] / world.hardware.nvlink_gbps
        assert found[name]["share"] == pytest.approx(carried / simulation.timeline.makespan_ns)
        assert 0 < found[name]["share"] <= found[name]["busy"] <= 1
        assert found[name]["share"] == pytest.approx(found[name]["busy"] * found[name]["share_while_busy"])


def test_floors_by_hand():
    world = small_world(hardware="4xH100", num_topk=1)  # bfloat16, gated, 2 experts to a rank
    simulation = simulate("flashmoe", world)
    roof = gather(simulation)["roofline"]
    operations = np.bincount(world.routing.topk_idx.ravel() // 2, minlength=4) * 6 * 192 * 80
    nbytes = 2 * 3 * 192 * 80 * 2
    assert roof["operations"] == pytest.approx(operations.mean())
    assert roof["tflops"] == pytest.approx(operations.mean() / simulation.timeline.makespan_ns / 1e3)
    assert roof["memory_bytes"] == nbytes
    assert roof["floors_us"]["products"] == pytest.approx(operations.max() / (roof["peak_tflops"] * 1e6))
    assert roof["floors_us"]["weights"] == pytest.approx(nbytes / (roof["memory_gbps"] * 1e3))
    idle = small_world("to-rank-0")
    weights = 192 * 80 * 3 * 2
    assert gather(simulate("flashmoe", idle))["roofline"]["memory_bytes"] * 4 == 2 * weights, "of one rank's experts"


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("name", ODD_WORLDS)
def test_every_schedule_multiplies_what_the_roof_counts(policy, name):
    world = ODD_WORLDS[name]
    assert multiplied(simulate(policy, world)).sum() == pytest.approx(operations(world).sum())


def test_what_a_knob_leaves_out_may_be_below_the_roof_and_the_page_says_so():
    world = small_world()
    said = {}
    for policy, knob, value in (
        ("deepep", "stages", "dispatch"),
        ("scmoe", "zero_share", 0.75),
        ("deepep", "gate", False),
    ):
        notes = gather(simulate(policy, world, make_knobs(policy, {knob: value})))["notes"]
        said[knob] = [note for note in notes if note.endswith("so it may be below the roof")]
    assert said["gate"] == []
    assert said["stages"] == [
        "the busiest rank multiplies 0 % of what the roof counts there, so it may be below the roof"
    ]
    assert 10 < float(re.search(r"(\d+) %", said["zero_share"][0])[1]) < 40


@pytest.mark.parametrize(("most", "ranks"), [(50_000, 4), (900, 4), (400, 2), (200, 0)])
def test_a_budget_bounds_what_is_drawn_and_the_page_says_so(monkeypatch, most, ranks):
    monkeypatch.setattr(gathering, "MOST_LEVELS", most)
    monkeypatch.setattr(gathering, "LEAST", 10)
    simulation = simulate("flashmoe", small_world(num_tokens=3000))
    found = gather(simulation)
    every = gathering.all_series(found["lanes"])
    assert sum(len(part["level"]) for part in every) <= most
    assert [lane["name"] for lane in found["lanes"]] == ["mean of 4 ranks", *(f"rank {rank}" for rank in range(ranks))]
    left_out = f"{ranks} of 4 ranks have lanes of their own; the mean is of all"
    assert (left_out in found["notes"]) == (ranks < 4)
    folded = [part for part in every if "every" in part]
    said = f"{len(folded)} of {len(every)} curves are means over equal parts of the time; the others are exact"
    assert (said in found["notes"]) == bool(folded) == (most < 50_000)
    (slots,) = [band for band in found["lanes"][0]["bands"] if band["name"] == "SM slots"]
    nodes = simulation.graph.nodes
    mine = nodes["kind"] == kinds.GEMM0
    expected = (nodes["count"] * nodes["duration_ns"])[mine].sum() / 4
    assert area(slots["parts"]["GEMM0"], found["horizon_ns"]) == pytest.approx(expected, rel=0.01)


def test_too_many_simulations_have_no_timeline():
    found = gather(simulate("bulk", small_world()), 10_000)
    assert found["lanes"] == []
    assert found["notes"] == ["no timeline: too many simulations on one page"]


def test_the_longest_steps_of_a_long_path():
    builder = GraphBuilder()
    chain = builder.add(
        np.resize([kinds.GEMM0, kinds.GEMM1], 90),
        0,
        server=builder.add_server("SM slots", 0, 1),
        duration_ns=1 + np.arange(90) % 45,
    )
    builder.edge(chain[:-1], chain[1:])
    simulation = simulation_of(builder.build(), 1)
    path = gathering._path(simulation, explain(simulation.graph, simulation.timeline))
    assert path["num_steps"] == 90
    assert [round(1000 * step["run_us"]) for step in path["longest"]] == [*range(31, 46)] * 2


def test_the_file_is_one_whose_values_can_be_read(tmp_path):
    simulations = [simulate(policy, small_world()) for policy in ("flashmoe", "bulk")]
    sim.write_page(simulations, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    value = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert value["simulated"] is True
    for one, simulation in zip(value["simulations"], simulations, strict=True):
        assert one["row"]["latency_us"] == one["latency_us"] == simulation.latency_us
        assert one["row"]["policy"] == simulation.policy
        used = {part for lane in one["lanes"] for band in lane["bands"] for part in band["parts"]}
        assert used & set(kinds.KIND_NAMES) <= value["colours"]["kinds"].keys()
        assert one["lanes"][0]["path"].keys() <= value["colours"]["path"].keys()
        assert {"resident", *one["row"]["idle"]} == value["colours"]["idle"].keys()
    assert not re.search(r"(?:src|href)=|https?://(?!www\.w3\.org/2000/svg)", text), "nothing comes from elsewhere"


def test_no_text_ends_the_element_it_stands_in():
    text = page({"preset": "</script><script>alert(1)</script><!--"})
    assert text.count("</script>") == page({}).count("</script>")
    assert "<!--" not in text


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a page must have at least one simulation, got none"):
        join([], [], tmp_path / "a.html")


def test_colours_of_kinds_differ():
    assert set(sim.reading.palette.COLOUR_OF_KIND) == set(kinds.KIND_NAMES)
    assert len(set(sim.reading.palette.COLOUR_OF_KIND.values())) == len(kinds.KIND_NAMES)
