"""The roof that no schedule is below, by hand; and that what a layer costs grows as the layer does."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from policy_worlds import small_world

from sim import POLICY_NAMES, simulate
from sim.drafting.cost import Cost
from sim.drafting.roof import roof_ns


def test_the_roof_by_hand():
    """Two ranks, an expert each, top-1; all tokens of rank 0 go to rank 1, those of rank 1 stay."""
    world = small_world(num_ranks=2, num_tokens=10, hidden=64, ffn=32, num_experts=2, num_topk=1, gated=False)
    world = replace(world, routing=replace(world.routing, topk_idx=np.ones_like(world.routing.topk_idx)))
    roof, hardware = roof_ns(world), world.hardware
    assert roof["weights"] == pytest.approx(64 * 64 * 2 / (hardware.hbm_gbps * hardware.hbm_achieved))
    assert roof["products"] == pytest.approx(2 * 20 * 64 * 64 / 989.4e3)
    assert roof["links"] == pytest.approx(10 * 64 * 2 / hardware.nvlink_gbps)


def test_a_token_crosses_once_for_all_experts_of_a_rank():
    world = small_world(num_ranks=2, num_tokens=10, num_experts=4, num_topk=2)
    topk_idx = np.broadcast_to(np.array([2, 3], np.int32), world.routing.topk_idx.shape)
    both = replace(world, routing=replace(world.routing, topk_idx=topk_idx))
    one = replace(world, routing=replace(world.routing, topk_idx=np.where(topk_idx == 3, -1, topk_idx)))
    assert roof_ns(both)["links"] == roof_ns(one)["links"] > 0


def test_between_nodes_a_token_crosses_once_to_each_by_any_nic():
    """Three nodes of 2, 2 and 1 ranks; rank 0 sends its 10 tokens to ranks 2 and 3, 7 of them to rank 4 as well."""
    world = small_world(num_ranks=5, num_tokens=10, hidden=64, num_experts=5, num_topk=3, hardware="3x2xH100")
    topk_idx = np.full_like(world.routing.topk_idx, -1)
    topk_idx[0, :, :2] = 2, 3
    topk_idx[0, :7, 2] = 4
    crossing = replace(world, routing=replace(world.routing, topk_idx=topk_idx))
    nic = world.hardware.nic_gbps
    assert roof_ns(crossing)["links"] == pytest.approx(max(17 / (2 * nic), 10 / (2 * nic), 7 / nic) * 64 * 2)
    shared = replace(crossing, hardware=replace(world.hardware, gpus_per_nic=2))
    assert roof_ns(shared)["links"] == pytest.approx(17 / nic * 64 * 2)
    topk_idx[0] = [0, 1, -1]
    within = roof_ns(replace(world, routing=replace(world.routing, topk_idx=topk_idx)))["links"]
    assert within == pytest.approx(10 * 64 * 2 / world.hardware.nvlink_gbps)


def test_a_shared_expert_is_under_the_roof():
    world = small_world(num_ranks=2, num_tokens=10, hidden=64, ffn=32, num_experts=2, num_topk=1, gated=False)
    both = replace(world, config=replace(world.config, shared_ffn=96))
    for name, more in (("weights", 64 * 96 * 2 * 2), ("products", 2 * 10 * 64 * 96 * 2)):
        rate = world.hardware.hbm_gbps * world.hardware.hbm_achieved if name == "weights" else 989.4e3
        assert roof_ns(both)[name] - roof_ns(world)[name] == pytest.approx(more / rate)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize(
    ("tokens", "hidden", "hardware"), [(1, 4096, "8xH100"), (5, 1088, "8xA100"), (33, 2048, "8xH20")]
)
def test_no_schedule_is_below_the_roof(policy, tokens, hidden, hardware):
    sizes = {"num_ranks": 8, "num_tokens": tokens, "hidden": hidden, "ffn": 1536, "num_experts": 64, "num_topk": 3}
    world = small_world(**sizes, hardware=hardware)
    shared = replace(world, config=replace(world.config, shared_ffn=2048))
    for each in (world, shared):
        assert 1000 * simulate(policy, each, keep_runs=False).latency_us >= max(roof_ns(each).values())


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("routing", ["uniform", "hot"])
def test_no_schedule_of_several_nodes_is_below_the_roof(policy, routing):
    """Few products, so that the NICs bound it."""
    sizes = {"num_ranks": 8, "num_tokens": 700, "hidden": 4096, "ffn": 64, "num_experts": 64, "num_topk": 6}
    world = small_world(routing, **sizes, hardware="2x4xH100")
    roof = roof_ns(world)
    assert max(roof, key=roof.get) == "links"
    assert 1000 * simulate(policy, world, keep_runs=False).latency_us >= roof["links"]


@pytest.mark.parametrize("policy", ["flashmoe", "megamoe", "deepep", "bulk", "sonic"])
def test_one_percent_more_columns_cost_at_most_three(policy):
    """With 133 tiles of a stage instead of 132, among others."""
    latency = {}
    for ffn in (1040, 1050, 1060, 1070):
        world = small_world(num_ranks=8, num_tokens=4, hidden=4096, ffn=ffn, num_experts=64, num_topk=4)
        latency[ffn] = simulate(policy, world, keep_runs=False).latency_us
    values = list(latency.values())
    assert all(after <= 1.03 * before for before, after in pairwise(values)), latency


def test_a_tile_more_than_slots_streams_a_tile_more():
    world = small_world(hidden=4096, ffn=8192)
    cost = Cost(world=world, slots=132, rate=0.9, tile_latency_ns=0)

    def streaming(tiles):
        return float(cost.tile(16, 256, 8192, tiles)) * -(-tiles // 132)

    assert streaming(133) == pytest.approx(133 / 132 * streaming(132), rel=1e-3)
    assert streaming(264) == pytest.approx(2 * streaming(132), rel=1e-3)


def test_padding_columns_are_multiplied_and_not_read():
    cost = Cost(world=small_world(hidden=4096, ffn=8192), slots=132, rate=0.9, tile_latency_ns=0)
    assert float(cost.tile(16, 256, 8192, 132, read=128)) < 0.6 * float(cost.tile(16, 256, 8192, 132))
    assert float(cost.tile(128, 256, 64, 132, read=1)) == float(cost.tile(128, 256, 64, 132, read=2))
