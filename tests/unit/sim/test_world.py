"""Worlds that do not fit are refused, and paths are the machine's."""

from dataclasses import replace

import numpy as np
import pytest
from policy_worlds import demanded_rows, odd_worlds, small_world

from reference import load_preset
from sim.drafting.cost import Cost
from sim.drafting.machine import add_machine
from sim.engine.graph import NONE, GraphBuilder
from sim.world.machine_files import load_hardware
from sim.world.precision import precision
from sim.world.routing import make_routing
from sim.world.world import World


@pytest.mark.parametrize("world", odd_worlds().values(), ids=odd_worlds().keys())
def test_traffic_is_counted_from_the_choices(world):
    np.testing.assert_array_equal(world.traffic, demanded_rows(world))
    np.testing.assert_array_equal(world.rows, demanded_rows(world).sum(axis=0))


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(ValueError, match="num_ranks must be at most the 2 GPUs of hardware 2xH100, got 4"):
        small_world(hardware="2xH100")


def test_what_does_not_fit_says_how_much_is_missing():
    config = load_preset("deepseek-v3", num_ranks=8, num_tokens=128, shared_ffn=0)
    parts = dict(hardware=load_hardware("8xH100"), routing=make_routing("even", config), precision=precision("float32"))
    # 32 experts of 3 matrices of 7168 x 2048 in 4 bytes: 5.6 GB would fit; 58 layers are not one.
    assert World(config=config, **parts).weight_bytes == 32 * 3 * 7168 * 2048 * 4
    small = replace(parts["hardware"], hbm_gb=5)
    with pytest.raises(ValueError, match=r"needs 5\.\d GB \(weights 5\.6, rows 0\.\d\), 0\.\d GB more than the 5 GB"):
        World(config=config, **(parts | dict(hardware=small)))


def test_a_routing_for_other_sizes_is_refused():
    world = small_world()
    with pytest.raises(ValueError, match="routing must be for num_ranks=4, got one for 2"):
        replace(world, routing=small_world(num_ranks=2, hardware="4xH100").routing)
    with pytest.raises(ValueError, match="routing must be for num_experts=8, got one for 4"):
        replace(world, routing=small_world(num_experts=4).routing)
    with pytest.raises(ValueError, match="routing must be for num_tokens=67, got one for 0"):
        replace(world, routing=replace(world.routing, topk_idx=world.routing.topk_idx[:, :0]))


def test_names_in_place_of_parts_are_refused():
    with pytest.raises(TypeError, match="hardware must be of type Hardware, got '8xH100'"):
        replace(small_world(), hardware="8xH100")
    with pytest.raises(TypeError, match="precision must be of type Precision, got 'fp8'"):
        replace(small_world(), precision="fp8")


def test_a_precision_that_the_hardware_lacks_is_refused():
    with pytest.raises(ValueError, match="precision fp8 computes in fp8, which 8xA100 has no rate for; it has float"):
        small_world(hardware="8xA100", precision_name="fp8")


def test_paths_are_nvlink_in_a_node_and_nics_between():
    world = small_world(hardware="2x2xH100")
    builder = GraphBuilder()
    machine = add_machine(builder, world, 1)
    path = machine.transfer([0, 0, 0], [0, 1, 2], 100.2)
    out, into = ([builder.links[link][:2] for link in path[side][1:]] for side in ("egress", "ingress"))
    assert out == [("NVLink out", 0), ("NIC out", 0)]
    assert into == [("NVLink in", 1), ("NIC in", 2)]
    assert (path["egress"][0], path["ingress"][0], path["nbytes"][0], path["latency_ns"][0]) == (NONE, NONE, 0, 0)
    assert path["nbytes"][1] == 101
    hardware = world.hardware
    want = [hardware.nvlink_latency_ns + hardware.flag_ns, hardware.nic_latency_ns + hardware.flag_ns]
    assert path["latency_ns"][1:].tolist() == want


def cost(slots, rate=0.5, **sizes):
    return Cost(world=small_world(**sizes), slots=slots, rate=rate, tile_latency_ns=100)


def test_a_tile_takes_the_longest_of_products_memory_and_cache():
    made = cost(slots=264, rate=0.25)
    hardware = made.world.hardware
    tall = made.tile(128, 128, 4096, tiles=10 * 264, reuse=8)
    assert tall == np.ceil(2 * 128 * 128 * 4096 / (989.4e3 * 0.25 / 264)) + 100
    short = made.tile(1, 128, 4096, tiles=10 * 264)
    assert short == np.ceil(128 * 4096 * 2 / (hardware.hbm_gbps * hardware.hbm_achieved * 0.89 / 264)) + 100
    cached = made.tile(1, 128, 4096, tiles=10 * 264, reuse=1000)
    assert cached == np.ceil((128 + 1) * 4096 * 2 / (hardware.l2_gbps / 264)) + 100


def test_a_task_of_hours_is_refused():
    for rate in (1e-14, 1e-300):  # the second is more than 64 bits hold
        with pytest.raises(ValueError, match=r"^a task must take less than 1100 s, got \d\S* s$"):
            cost(slots=264, rate=rate).tile(128, 128, 4096, tiles=1000)


def test_few_tiles_share_the_memory_among_fewer():
    made = cost(slots=264)
    hbm = made.world.hardware.hbm_gbps * made.world.hardware.hbm_achieved * 0.89
    tiles = 150  # more than the multiprocessors, fewer than the slots
    assert made.tile(1, 128, 4096, tiles) == np.ceil(128 * 4096 * 2 / (hbm / 150)) + 100
    lone, half, all_slots = (made.tile(128, 128, 4096, tiles, reuse=100) for tiles in (1, 132, 264))
    assert lone < half < all_slots


def test_few_streams_share_the_memory_among_fewer():
    made = cost(slots=264)
    hardware = made.world.hardware
    crossing = 3 * 4096 * made.world.config.hidden * 2  # 4,096 tokens, and two rows of each
    memory, port = hardware.hbm_gbps * hardware.hbm_achieved, 64 * hardware.clock_ghz / 2  # of two slots
    for tasks, gbps in ((1, port), (132, memory / 132), (150, memory / 150), (1000, memory / 250)):
        assert made.combine(4096, 8192, tasks) == np.ceil(crossing / gbps) + 100
    assert made.stream(1e6) == made.stream(1e6, tasks=264) == made.stream(1e6, tasks=528)


def test_weights_are_read_once_per_wave_unless_they_stay_in_the_cache():
    made = cost(slots=264)
    assert made.reuse(5, 1024, 1024, 128) == 5  # 2 MB
    # 64 column tiles of a matrix of 134 MB: 4 row blocks at a time, so 10 of them are three waves.
    assert made.reuse(10, 8192, 8192, 128) == 10 / 3
