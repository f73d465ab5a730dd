"""NumPy's scalars are numbers in every value of the simulator, kept as Python's; truth values are no numbers."""

from dataclasses import replace

import numpy as np
import pytest
from policy_worlds import small_world

from sim.engine import compiled, plain
from sim.policies import build, make_knobs
from sim.world.machine_files import load_hardware, to_toml
from sim.world.placement import balance
from sim.world.precision import precision
from sim.world.rounding import round_tokens


def test_values_are_kept_as_pythons():
    machine = load_hardware("8xH100")
    tflops = {key: np.float32(value) for key, value in machine.tflops.items()} | {"bfloat16": np.int64(989)}
    given = dict(sms=np.int64(132), hbm_gbps=np.float64(3350.5), flag_ns=np.uint16(900), num_nodes=np.array(2))
    text = to_toml(replace(machine, **given, tflops=tflops))
    plain = {key: float(value) for key, value in tflops.items()} | {"bfloat16": 989}
    assert text == to_toml(replace(machine, sms=132, hbm_gbps=3350.5, flag_ns=900, num_nodes=2, tflops=plain))
    knobs = make_knobs("flashmoe", {"rate": np.float64(0.5), "token_block": np.int32(16)})
    assert repr(knobs) == repr(make_knobs("flashmoe", {"rate": 0.5, "token_block": 16}))
    narrow = replace(precision("fp8"), weight_bytes=np.float32(0.5))
    assert repr(narrow) == repr(replace(precision("fp8"), weight_bytes=0.5))


def test_sizes_and_seeds_of_transforms_and_engines():
    world = small_world(seed=np.int64(3))
    graph = build("flashmoe", world, make_knobs("flashmoe", {}))
    for run in (plain.run, compiled.run):
        assert run(graph, tie_seed=np.int64(5)).makespan_ns == run(graph, tie_seed=5).makespan_ns
    routing = replace(world.routing, num_experts=np.int64(world.routing.num_experts))
    assert type(routing.num_experts) is int
    rounded = round_tokens(routing, np.int64(4), seed=np.uint8(1))
    np.testing.assert_array_equal(rounded.topk_idx, round_tokens(world.routing, 4, seed=1).topk_idx)
    copies = balance(routing, np.int64(4))
    assert copies.name == balance(world.routing, 4).name and copies.num_experts == world.routing.num_experts + 4


@pytest.mark.parametrize("wrong", [np.bool_(True), np.float32(2.5)])
def test_what_is_no_integer_is_refused(wrong):
    with pytest.raises(TypeError, match="sms must be an integer"):
        replace(load_hardware("8xH100"), sms=wrong)
    with pytest.raises(TypeError, match="token_block must be of type int"):
        make_knobs("flashmoe", {"token_block": wrong})
    with pytest.raises(TypeError, match="replicas must be an integer"):
        balance(small_world().routing, wrong)
