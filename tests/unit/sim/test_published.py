"""The columns of MegaMoE's table follow from its microseconds by its benchmark's formulas."""

import csv
from pathlib import Path

import pytest

import sim
from reference import MoEConfig
from sim.validation.published import megamoe_columns
from sim.world.machine_files import load_hardware
from sim.world.precision import precision
from sim.world.routing import make_routing
from sim.world.world import World

TABLE = Path(sim.__file__).parent / "data" / "megamoe.csv"


def published():
    """{(tokens, hidden, ffn, experts, topk): {metric: value}} of the fused kernel."""
    found = {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["system"] == "MegaMoE":
                names = ("tokens_per_rank", "hidden", "intermediate", "experts", "topk")
                found.setdefault(tuple(int(row[name]) for name in names), {})[row["metric"]] = float(row["value"])
    return found


def world_of(sizes, precision_name="fp8xfp4"):
    tokens, hidden, ffn, experts, topk = sizes
    config = MoEConfig(
        num_ranks=8, num_tokens=tokens, hidden=hidden, ffn=ffn, num_experts=experts, num_topk=topk, gated=True
    )
    routing = make_routing("uniform", config)
    hardware = load_hardware("8xB200")
    return World(config=config, hardware=hardware, routing=routing, precision=precision(precision_name))


@pytest.mark.parametrize("sizes", published(), ids=str)
def test_columns_follow_from_the_time(sizes):
    columns = published()[sizes]
    got = megamoe_columns(world_of(sizes), columns["layer_latency"])
    # One token per rank: 48 rows for 256 or 384 experts, so the weights that are read depend on the draw, which is not
    # published. The other two columns depend on the number of rows only.
    names = ("compute_throughput", "nvlink_bw") if sizes[0] == 1 else got
    for name in names:
        assert got[name] == pytest.approx(columns[name], abs=0.5 + 0.005 * columns[name]), name


def test_the_table_has_all_its_rows():
    assert sorted({sizes[0] for sizes in published()}) == [1, 512, 8192, 32768]
    assert len(published()) == 8


def test_weights_of_idle_experts_are_not_counted():
    few = world_of((1, 4096, 2048, 256, 6))
    active = (few.routing.counts.sum(axis=0) > 0).sum() / 8
    assert active < 32
    rows_bytes = 6 * (4096 + 2 * 2048 + 2 * 4096)
    want = active * 3 * 4096 * 2048 / 2 + rows_bytes
    reduction = 7 * 4096 * 2 / 6.5e12
    assert megamoe_columns(few, 50.0)["hbm_bw"] == pytest.approx(want / (50e-6 - reduction) / 1e9)


def test_other_precisions_are_errors():
    with pytest.raises(ValueError, match="precision must be one of fp8xfp4, fp8, bfloat16; got 'float16'"):
        megamoe_columns(world_of((1, 64, 32, 8, 2), "float16"), 1.0)
