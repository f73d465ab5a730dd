"""Reports: shares add up, and all numbers that come from sweeps are recounted nanosecond by nanosecond."""

import json
from dataclasses import asdict, replace
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from graphs import simulation_of, simulations
from hypothesis import given
from policy_worlds import odd_worlds, small_world

from reference import MoEConfig
from sim.engine import kinds
from sim.engine.graph import NONE, GraphBuilder
from sim.policies import POLICY_NAMES, make_knobs
from sim.reading.measures import IDLE_CAUSES, dense_us, exposed_communication_us, host_us, num_slots, slot_shares
from sim.reading.report import report
from sim.simulation import simulate
from sim.world.scenario import Scenario

ODD_WORLDS = odd_worlds()
GRADIENTS = (kinds.WEIGHTS, kinds.ROUTER_WEIGHTS, kinds.SHARED_WEIGHTS)
COMPUTES = (kinds.GEMM0, kinds.GEMM1, kinds.SHARED0, kinds.SHARED1, *GRADIENTS, kinds.DENSE)


def runs_of(simulation):
    """(node, count, start, end, arrive) of each run."""
    time = simulation.timeline
    columns = (time.run_node, time.run_count, time.run_start_ns, time.run_end_ns, time.run_arrive_ns)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def place_of(graph, node):
    server = graph.nodes["server"][node]
    return graph.nodes["rank"][node] if server == NONE else graph.servers[server].rank


def cause_by_hand(simulation, node):
    nodes, cause = simulation.graph.nodes, simulation.timeline.cause
    last = cause[node]
    while last != NONE and cause[last] != NONE:
        gap = nodes["kind"][last] == kinds.LAUNCH and nodes["server"][last] == NONE
        if nodes["kind"][last] not in (kinds.JOIN, kinds.RECEIVE) and not gap:
            break
        last = cause[last]
    if last == NONE:
        return "dependency"
    if nodes["kind"][last] in (kinds.LAUNCH, kinds.BARRIER):
        return "launch" if nodes["kind"][last] == kinds.LAUNCH else "barrier"
    linked = nodes["egress"][last] != NONE or nodes["ingress"][last] != NONE
    elsewhere = place_of(simulation.graph, last) != place_of(simulation.graph, node)
    return "waiting" if linked or elsewhere else "dependency"


def shares_by_hand(simulation):
    """Slot by slot and nanosecond by nanosecond."""
    graph, time = simulation.graph, simulation.timeline
    names = [server.name for server in graph.servers]
    slots = max(
        [simulation.world.hardware.sms] + [server.slots for server in graph.servers if server.name == "SM slots"]
    )
    shares = dict.fromkeys(("resident", *IDLE_CAUSES), 0)
    horizon = max(1, time.makespan_ns)
    for rank in range(simulation.world.num_ranks):
        mine = [
            run
            for run in runs_of(simulation)
            if place_of(graph, run[0]) == rank
            and graph.nodes["server"][run[0]] != NONE
            and names[graph.nodes["server"][run[0]]] not in ("OS block", "host")
        ]
        for now in range(horizon):
            held = min(slots, sum(count for _, count, start, end, _ in mine if start <= now < end))
            later = [(start, index) for index, (_, _, start, _, _) in enumerate(mine) if start > now]
            cause = cause_by_hand(simulation, mine[min(later)[1]][0]) if later else "tail"
            shares["resident"] += held
            shares[cause] += slots - held
    return {name: value / (slots * horizon * simulation.world.num_ranks) for name, value in shares.items()}


def exposed_by_hand(simulation):
    graph = simulation.graph
    nodes = graph.nodes
    total = 0
    for rank in range(simulation.world.num_ranks):
        for now in range(simulation.timeline.makespan_ns):
            computing = moving = False
            for node, _, start, end, arrive in runs_of(simulation):
                kind, egress, ingress = nodes["kind"][node], nodes["egress"][node], nodes["ingress"][node]
                computing |= bool(place_of(graph, node) == rank and kind in COMPUTES and start <= now < end)
                source = graph.links[egress].rank if egress != NONE else nodes["rank"][node]
                target = graph.links[ingress].rank if ingress != NONE else nodes["peer"][node]
                begin = start if kind in (kinds.DISPATCH, kinds.SEND) else end
                linked = egress != NONE or ingress != NONE
                moving |= bool(linked and rank in (source, target) and begin <= now < arrive)
            total += moving and not computing
    return total / simulation.world.num_ranks / 1000


def alone_by_hand(simulation, of_interest, beside):
    """Microseconds of a rank in which something of interest is going on, and nothing beside, as a mean."""
    graph = simulation.graph
    nodes, names = graph.nodes, [*(server.name for server in graph.servers), "none"]
    total = 0
    for rank in range(simulation.world.num_ranks):
        for now in range(simulation.timeline.makespan_ns):
            on = set()
            for node, _, start, end, arrive in runs_of(simulation):
                kind, egress, ingress = nodes["kind"][node], nodes["egress"][node], nodes["ingress"][node]
                name = names[nodes["server"][node]]
                if start <= now < end and (kind == kinds.BARRIER):
                    on.add("meeting")
                if start <= now < end and place_of(graph, node) == rank:
                    on.add("host" if name == "host" else "off" if name in ("none", "OS block") else
                           "dense" if kind == kinds.DENSE else "task")  # fmt: skip
                source = graph.links[egress].rank if egress != NONE else nodes["rank"][node]
                target = graph.links[ingress].rank if ingress != NONE else nodes["peer"][node]
                begin = start if kind in (kinds.DISPATCH, kinds.SEND) else end
                if (egress != NONE or ingress != NONE) and rank in (source, target) and begin <= now < arrive:
                    on.add("transfer")
            total += of_interest in on and not on & beside
    return total / simulation.world.num_ranks / 1000


@given(simulation=simulations())
def test_time_of_the_host_alone_and_of_dense_work_are_those_counted_by_hand(simulation):
    beside_host = {"task", "dense", "transfer", "meeting"}
    assert host_us(simulation) == pytest.approx(alone_by_hand(simulation, "host", beside_host), abs=1e-12)
    assert dense_us(simulation) == pytest.approx(alone_by_hand(simulation, "dense", {"task"}), abs=1e-12)


@given(simulation=simulations())
def test_shares_are_those_counted_by_hand_and_add_up(simulation):
    shares = slot_shares(simulation)
    assert sum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert shares == pytest.approx(shares_by_hand(simulation), abs=1e-12)


@given(simulation=simulations())
def test_exposed_communication_is_that_counted_by_hand(simulation):
    assert exposed_communication_us(simulation) == pytest.approx(exposed_by_hand(simulation), abs=1e-12)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("world", ODD_WORLDS.values(), ids=ODD_WORLDS.keys())
def test_shares_of_every_policy_add_up(policy, world):
    simulation = simulate(policy, world)
    said = report(simulation)
    assert said.resident + sum(said.idle.values()) == pytest.approx(1)
    assert all(0 <= share <= 1 + 1e-12 for share in (said.resident, *said.idle.values()))
    assert 0 <= said.useful <= said.tensor_busy * (1 + 1e-9)
    assert 0 <= said.exposed_communication_us <= said.latency_us
    assert 0 <= said.host_us + said.dense_us <= said.latency_us
    assert (said.dense_us > 0) == (policy == "scmoe")
    assert tuple(said.idle) == IDLE_CAUSES


def test_every_cause_of_idling():
    """Rank 0 has two slots: each interval before a task, and the tail, has another cause."""
    builder = GraphBuilder()
    slots = builder.add_server("SM slots", 0, 2)
    far = builder.add_server("SM slots", 1, 2)
    host = builder.add_server("host", 0, 1)
    links = {"egress": builder.add_link("NVLink out", 1, 1.0), "nbytes": 3, "latency_ns": 4}
    launch = builder.add(kinds.LAUNCH, 0, server=host, duration_ns=10)  # until 10
    gate = builder.add(kinds.GATE, 0, server=slots, duration_ns=5)  # 10 to 15
    alone = builder.add(kinds.GATE, 0, duration_ns=20)  # nothing that holds a slot, on the same GPU: 15 to 35
    dense = builder.add(kinds.DENSE, 0, server=slots, duration_ns=1, count=2)  # 35 to 36
    meeting = builder.add(kinds.BARRIER, 0, duration_ns=4)  # 36 to 40
    gemm = builder.add(kinds.GEMM0, 0, server=slots, duration_ns=10)  # 40 to 50
    sent = builder.add(kinds.DISPATCH, 1, server=far, duration_ns=53, **links)  # 0 to 53, there at 60
    receive = builder.add(kinds.RECEIVE, 0, duration_ns=2)  # until 62
    last = builder.add(kinds.COMBINE, 0, server=slots, duration_ns=8)  # 62 to 70
    end = builder.add(kinds.SEND, 0, duration_ns=30)  # until 100
    for before, after in ((launch, gate), (gate, alone), (alone, dense), (dense, meeting), (meeting, gemm)):
        builder.edge(before, after)
    for before, after in ((sent, receive), (receive, last), (gemm, last), (last, end)):
        builder.edge(before, after)
    shares = slot_shares(simulation_of(builder.build(), num_ranks=2))
    # Of 400 slot-nanoseconds rank 1 holds 53; it has no other task, so the rest of its 200 is the tail.
    expected = {"launch": 20, "dependency": 5 + 2 * 20, "barrier": 8, "waiting": 10 + 2 * 12}
    expected |= {"tail": 8 + 2 * 30 + 53 + 2 * 47, "resident": 5 + 2 + 10 + 8 + 53}
    assert sum(expected.values()) == 400
    assert {name: share * 400 for name, share in shares.items()} == pytest.approx(expected)


def test_operations_and_tokens_over_time():
    world = small_world(num_tokens=64)
    simulation = simulate("flashmoe", world, make_knobs("flashmoe", {"gate": False, "packing": "per_source"}))
    said = report(simulation)
    rows = world.routing.counts.sum()
    config, seconds = world.config, said.latency_us / 1e6
    work = rows * 2 * config.hidden * 3 * config.ffn
    peak = world.hardware.tflops["bfloat16"] * 1e12 * world.num_ranks
    assert said.useful == pytest.approx(work / (peak * seconds))
    padded = (-(-world.routing.counts // 128) * 128).sum()
    assert said.tensor_busy == pytest.approx(said.useful * padded / rows)
    assert said.tokens_per_s == pytest.approx(4 * 64 / seconds)
    assert (said.ranks, said.tokens) == (4, 64)


def test_what_was_dropped_and_added_is_said():
    """Of 8 tokens on each of 2 ranks, 3 go nowhere: two lost their only choice, and one was never there."""
    config = MoEConfig(num_ranks=2, num_tokens=8, hidden=64, ffn=64, num_experts=4, num_topk=1, capacity=4)
    choices = np.array([[0, 0, 0, 0, 0, 0, 1, 2], [3, 3, 3, 1, 1, 2, 2, 4]])  # 4: no choice
    with TemporaryDirectory() as folder:
        np.savez(f"{folder}/x.npz", topk_idx=choices[..., None])
        scenario = Scenario(config=config, hardware="2xH100", precision="bfloat16", routing=f"{folder}/x.npz")
        said = report(simulate("flashmoe", scenario.make()))
        rounded = report(simulate("flashmoe", replace(scenario, round_to=4, round_how="up").make()))
    assert (said.capacity, said.rows, said.dropped, said.added, said.computed_tokens) == (4, 13, 2, 0, 13)
    assert said.tokens_per_s == pytest.approx(13 / (said.latency_us / 1e6))
    assert said.rank_imbalance == pytest.approx(7 / 6.5), "4 + 3 rows on rank 0, 3 + 3 on rank 1"
    assert said.expert_imbalance == pytest.approx(4 / (13 / 4))
    assert (rounded.rows, rounded.dropped, rounded.added) == (16, 2, 3)


def test_nothing_is_even():
    said = report(simulate("flashmoe", small_world(silent_ranks=(0, 1, 2, 3))))
    assert (said.rows, said.computed_tokens, said.tokens_per_s) == (0, 0, 0)
    assert (said.rank_imbalance, said.expert_imbalance) == (1, 1)


@pytest.mark.parametrize("hardware", ["4xH100", "2x2xH100"])
def test_bytes_of_links_are_those_of_the_rows(hardware):
    world = small_world(hardware=hardware)
    said = report(simulate("flashmoe", world))
    out = {"nvlink": np.zeros(4), "nic": np.zeros(4)}
    into = {"nvlink": np.zeros(4), "nic": np.zeros(4)}
    per_node = world.hardware.gpus_per_node
    for source, owner in zip(*np.nonzero(~np.eye(4, dtype=bool)), strict=True):
        kind = "nvlink" if source // per_node == owner // per_node else "nic"
        nbytes = world.traffic[source, owner] * world.config.hidden * 2
        for sender, receiver in ((source, owner), (owner, source)):  # the rows, and their results
            out[kind][sender] += nbytes
            into[kind][receiver] += nbytes
    for kind in out:
        carried = np.concatenate([out[kind], into[kind]])
        room = simulate("flashmoe", world).graph.num_tasks  # each transfer is whole bytes
        assert carried.max() <= getattr(said, f"{kind}_bytes_max") <= carried.max() + room
        assert carried.mean() <= getattr(said, f"{kind}_bytes_mean") <= carried.mean() + room


def test_a_report_is_json_and_says_that_it_is_simulated():
    said = json.loads(json.dumps(asdict(report(simulate("flashmoe", small_world()))), allow_nan=False))
    assert said["simulated"] is True
    assert (said["policy"], said["hardware"], said["precision"]) == ("flashmoe", "4xH100", "bfloat16")
    assert said["knobs"]["tile_m"] == 128
    assert said["overlap_efficiency"] is None


def test_a_rate_that_is_given_is_not_fitted():
    simulation = simulate("flashmoe", small_world(), make_knobs("flashmoe", {"rate": 0.25}))
    said = report(simulation)
    assert (said.rate, said.rate_fitted) == (0.25, False)


def test_the_error_is_that_of_the_policy_the_chip_and_the_tokens(monkeypatch):
    errors = {"bulk": {"H100": {"up to 128": 0.2, "up to 1024": 0.3}}, "t3": {"H100": {"more": 0.4}}}
    monkeypatch.setattr("sim.drafting.trust.left_out_errors", lambda: errors)

    def said(policy, knobs=(), chip="H100", **sizes):
        world = small_world(**sizes)
        world = replace(world, hardware=replace(world.hardware, name="mine", chip=chip))
        return report(simulate(policy, world, make_knobs(policy, dict(knobs)))).left_out_error

    assert [said("bulk", num_tokens=tokens) for tokens in (1, 128, 129)] == [0.2, 0.2, 0.3]
    assert said("t3", num_tokens=128) is None, "none with so few tokens"
    assert said("bulk", chip="H20") is said("comet") is None
    assert said("bulk", {"rate": 0.5}) is None, "measurements say nothing of a rate that is set"


def test_engines_beside_each_other_hold_no_more_slots_than_there_are():
    builder = GraphBuilder()
    for name in ("SM slots", "pull engines"):
        server = builder.add_server(name, 0, 3)
        builder.add(kinds.GEMM0, 0, server=server, duration_ns=7, count=3)
    simulation = simulation_of(builder.build(), num_ranks=1)
    assert num_slots(simulation) == 3
    assert slot_shares(simulation)["resident"] == 1


def test_runs_that_were_not_kept_are_an_error():
    with pytest.raises(ValueError, match="simulation must have runs: simulate with keep_runs=True"):
        report(simulate("flashmoe", small_world(), keep_runs=False))
