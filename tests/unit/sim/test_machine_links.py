"""Links that GPUs share, links with other names, and rates by chip: what a machine of the user's own may say."""

from dataclasses import replace

import numpy as np
import pytest
from policy_worlds import run_both, run_policy, small_world

import sim
from flashmoe_numba import cli
from sim.drafting.draft import Draft
from sim.drafting.machine import add_machine
from sim.drafting.rates import fitted_rate, fitted_rates
from sim.engine.graph import NONE, GraphBuilder
from sim.engine.kinds import SEND
from sim.policies import POLICY_NAMES
from sim.reading.bands import link_bands
from sim.reading.measures import transfers
from sim.studies.what_if import changes
from sim.world.machine_files import to_toml

NBYTES = 10**6


def changed(world, **values):
    return replace(world, hardware=replace(world.hardware, **values))


def together_ns(world, pairs):
    """When each of these transfers of `NBYTES` has arrived, all begun at once; without latencies."""
    builder = GraphBuilder()
    machine = add_machine(builder, world, 1)
    source, target = np.array(pairs).T
    path = machine.transfer(source, target, NBYTES)
    path["latency_ns"] = 0
    builder.add(SEND, source, peer=target, **path)
    return run_both(builder.build()).done_ns.tolist()


@pytest.mark.parametrize(("hardware", "field", "rate"), [
    ("4xH100", "gpus_per_link", "nvlink_gbps"), ("2x2xH100", "gpus_per_nic", "nic_gbps"),
])  # fmt: skip
def test_gpus_that_share_a_link_share_its_bandwidth(hardware, field, rate):
    world = changed(small_world(hardware=hardware), **{rate: 10.0})
    alone = NBYTES // 10
    assert together_ns(world, [(0, 2), (1, 3)]) == [alone, alone]
    shared = changed(world, **{field: 2})
    assert together_ns(shared, [(0, 2), (1, 3)]) == [2 * alone, 2 * alone], "both ends are shared"
    assert together_ns(shared, [(0, 2)]) == [alone], "one GPU has it all"
    assert together_ns(shared, [(0, 2), (3, 1)]) == [alone, alone], "the ways out and in are two"


def with_cores(world, gbps):
    """What leaves a node is carried by cores."""
    return changed(world, core_gbps=gbps, sources={**world.hardware.sources, "core_gbps": "a test"})


def test_what_cores_carry_takes_their_time():
    """One slot sends 1 MB within its node, and 2 MB to another, of which cores then carry 4 bytes in a ns."""
    world = changed(small_world(num_ranks=4, hardware="2x2xH100"), nvlink_gbps=10.0, nic_gbps=5.0)
    hardware = world.hardware
    latency_ns = np.array([hardware.nvlink_latency_ns, hardware.nic_latency_ns]) + hardware.flag_ns
    for far_ns, carrying in ((400_000, world), (500_000 + 400_000, with_cores(world, 4.0))):
        draft = Draft(carrying, sim.make_knobs("flashmoe", {}), "flashmoe", 1)
        ends = draft.send(SEND, np.array([0, 0]), np.array([1, 2]), np.array([10**6, 2 * 10**6]))
        done_ns = run_both(draft.builder.build()).done_ns[ends] - latency_ns
        assert done_ns.tolist() == [100_000, far_ns]


def task_ns(graph):
    """The time of all tasks together."""
    return int((graph.nodes["count"] * graph.nodes["duration_ns"]).sum())


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_schedule_pays_cores_for_what_leaves_a_node(policy):
    world, fixed = small_world(num_ranks=4, hardware="2x2xH100"), {}
    if policy == "flashmoe":
        fixed = {"packing": "per_source"}  # else row blocks are cut by when rows come
    before, _ = run_policy(policy, world, **fixed)
    graph, _ = run_policy(policy, with_cores(world, 1.0), **fixed)
    nics = [i for i, link in enumerate(graph.links) if link.name == "NIC out"]
    far = np.isin(graph.nodes["egress"], nics)
    far_bytes = int((graph.nodes["count"] * graph.nodes["nbytes"])[far].sum())
    assert task_ns(graph) - task_ns(before) == far_bytes > 0
    assert (graph.nodes["server"][far] != NONE).all()


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_schedule_runs_on_shared_links(policy):
    """Links carry as much as before, on half as many links within nodes and a fourth of those between them."""
    world = small_world(num_ranks=4, hardware="2x2xH100")
    graph, timeline = run_policy(policy, world)
    shared = changed(world, gpus_per_link=2, gpus_per_nic=2, node_link="PCIe", network_link="RoCE")
    other, slower = run_policy(policy, shared)
    assert [link.name for link in other.links] == [
        *["PCIe out"] * 2, *["PCIe in"] * 2, *["RoCE out"] * 2, *["RoCE in"] * 2
    ]  # fmt: skip
    for name, index in (("NVLink", "PCIe"), ("NIC", "RoCE")):
        before = sum(b for link, b in zip(graph.links, timeline.link_bytes, strict=True) if link.name.startswith(name))
        after = sum(b for link, b in zip(other.links, slower.link_bytes, strict=True) if link.name.startswith(index))
        assert after == before > 0


def test_a_ranks_transfers_are_its_own_on_a_shared_link():
    """A rank is at as many ends of transfers as without sharing, not all ends at the first of those that share."""
    world = small_world(hardware="4xH100")
    shared = changed(world, gpus_per_link=4)
    usual, others = (np.bincount(transfers(sim.simulate("megamoe", of))[0]) for of in (world, shared))
    np.testing.assert_array_equal(usual, others)


def test_reports_and_what_if_know_links_by_the_machines_names():
    world = small_world(hardware="2x2xH100")
    named = changed(world, node_link="XGMI", network_link="Slingshot")
    before, after = (sim.report(sim.simulate("bulk", of)) for of in (world, named))
    assert after == replace(before, node_link="XGMI", network_link="Slingshot")
    names = [change.name for change in changes(sim.simulate("bulk", named))]
    assert {"XGMI twice as fast", "Slingshots twice as fast"} <= set(names)


def test_a_machine_of_a_chip_has_its_fitted_rates():
    world = small_world()
    fitted = fitted_rates()["flashmoe"]["H100"]["rate"]
    for machine in (world.hardware, replace(world.hardware, name="mine")):
        told = sim.report(sim.simulate("flashmoe", replace(world, hardware=machine)))
        assert (told.rate, told.rate_fitted) == (fitted, True)
        by_hand = sim.simulate("flashmoe", world, sim.make_knobs("flashmoe", {"rate": fitted}))
        assert told.latency_us == by_hand.latency_us, "it is computed by the rate that is told"
    other = replace(world.hardware, name="mine", chip="H20")
    told = sim.report(sim.simulate("flashmoe", replace(world, hardware=other)))
    carried = fitted_rate("flashmoe", "H20")
    assert (told.rate, told.rate_fitted) == (carried, False) and carried != fitted, "what H100's is on that chip"
    unknown = sim.simulate("flashmoe", replace(world, hardware=replace(world.hardware, name="mine", chip="V100")))
    assert not sim.report(unknown).rate_fitted


def test_a_shared_link_is_in_the_bands_of_all_that_share_it():
    world = changed(small_world(hardware="4xH100"), gpus_per_link=2)
    simulation = sim.simulate("bulk", world)
    total = simulation.timeline.makespan_ns
    carried = {(link.name, link.rank): float(simulation.timeline.link_bytes[index]) / link.gbps / total
               for index, link in enumerate(simulation.graph.links)}  # fmt: skip
    for group, owners in (([0, 1, 2, 3], [0, 0, 2, 2]), ([NONE, 0, NONE, 1], [0, 2])):
        for band in link_bands(simulation, np.array(group)):
            steps = band.parts[band.name]
            share = np.bincount(steps.group, (steps.right - steps.left) * steps.level) / total
            assert share == pytest.approx([carried[band.name, owner] for owner in owners], abs=1e-4)


def test_the_table_calls_links_as_the_machine_does(tmp_path, capsys):
    machine = replace(sim.load_hardware("2x2xH100"), node_link="XGMI", network_link="Slingshot")
    (tmp_path / "mine.toml").write_text(to_toml(machine), encoding="utf-8")
    flags = ["--preset", "laptop-text", "--tokens", "64", "--hardware", str(tmp_path / "mine.toml")]
    assert cli.main(["sim", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[4].split()[-2:] == ["XGMI", "Slingshot"]


ROOT_PORT = {"node_link": "PCIe", "network_link": "PCIe", "nvlink_gbps": 10.0, "nic_gbps": 10.0}


def test_a_root_port_is_one_link_for_what_stays_and_what_leaves():
    world = changed(small_world(hardware="2x2xH100"), **ROOT_PORT)
    alone = NBYTES // 10
    assert together_ns(world, [(0, 1), (0, 2)]) == [2 * alone, 2 * alone], "out of GPU 0, whether it leaves or not"
    shared = changed(world, gpus_per_link=2, gpus_per_nic=2)
    assert together_ns(shared, [(0, 1), (1, 2)]) == [2 * alone, 2 * alone], "out of the port of both"
    assert together_ns(changed(world, network_link="NIC"), [(0, 1), (0, 2)]) == [alone, alone]


def test_bytes_of_a_root_port_are_counted_once():
    apart = small_world(hardware="2x2xH100")
    one = sim.simulate("bulk", changed(apart, **ROOT_PORT))
    graph, timeline = run_policy("bulk", apart)
    per_rank = np.zeros(4, np.int64)
    for link, nbytes in zip(graph.links, timeline.link_bytes, strict=True):
        per_rank[link.rank] += nbytes if link.name.endswith("out") else 0
    told = sim.report(one)
    assert (told.nic_bytes_max, len(one.graph.links)) == (0, 8)
    assert told.nvlink_bytes_max >= per_rank.max()
    assert told.nvlink_bytes_mean == per_rank.mean()
    names = [change.name for change in changes(one)]
    assert "PCIe twice as fast" in names and "PCIes twice as fast" not in names
