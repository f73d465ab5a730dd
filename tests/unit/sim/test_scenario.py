"""A scenario is the world of its parts, whoever names them, and says which part is wrong."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

import sim
from reference import MoEConfig

CONFIG = MoEConfig(num_ranks=4, num_tokens=67, hidden=192, ffn=80, num_experts=8, num_topk=2)
SCENARIO = sim.Scenario(config=CONFIG, hardware="4xH100", precision="fp8", routing="zipf:1", seed=3)


def assert_same(one, other):
    assert (one.config, one.hardware, one.precision) == (other.config, other.hardware, other.precision)
    assert one.routing.name == other.routing.name
    np.testing.assert_array_equal(one.routing.topk_idx, other.routing.topk_idx)
    np.testing.assert_array_equal(one.routing.owner, other.routing.owner)


def test_names_and_parts_make_the_same_world():
    routing = sim.make_routing("zipf:1", CONFIG, 3)
    hardware, precision = sim.load_hardware("4xH100"), sim.precision("fp8")
    by_hand = sim.World(config=CONFIG, hardware=hardware, routing=routing, precision=precision)
    assert_same(SCENARIO.make(), by_hand)
    assert_same(replace(SCENARIO, hardware=hardware, precision=precision, routing=routing).make(), by_hand)
    assert not np.array_equal(replace(SCENARIO, seed=4).make().routing.topk_idx, routing.topk_idx)


def test_rows_are_rounded_before_experts_are_placed():
    world = replace(SCENARIO, round_to=16, round_how="up", replicas=4).make()
    routing = sim.balance(sim.round_tokens(sim.make_routing("zipf:1", CONFIG, 3), 16, "up", 3), 4)
    assert_same(world, replace(SCENARIO, routing=routing).make())


@pytest.mark.parametrize(
    ("wrong", "part", "error"),
    [
        (dict(hardware="4xK20"), "hardware", ValueError),
        (dict(precision="fp5"), "precision", ValueError),
        (dict(config=replace(CONFIG, num_tokens=2**29)), "tokens", ValueError),
        (dict(routing="cold"), "routing", ValueError),
        (dict(routing="none.npz"), "routing", FileNotFoundError),
        (dict(round_to=0), "rounding", ValueError),
        (dict(replicas=3), "replicas", ValueError),
        (dict(hardware="2xH100"), "layer", ValueError),
    ],
)
def test_the_part_that_is_wrong_is_blamed(wrong, part, error):
    blamed = []

    @contextmanager
    def blame(part):
        try:
            yield
        except Exception:
            blamed.append(part)
            raise

    with pytest.raises(error):
        replace(SCENARIO, **wrong).make(blame)
    assert blamed == [part]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(config=None), "config must be of type MoEConfig, got None"),
        (dict(hardware=3), "hardware must be a name, or of type Hardware, got 3"),
        (dict(precision=None), "precision must be a name, or of type Precision, got None"),
        (dict(routing=[1]), r"routing must be a name, or of type SimRouting, got \[1\]"),
    ],
)
def test_a_part_of_another_kind_is_refused_at_once(wrong, said):
    with pytest.raises(TypeError, match=said):
        replace(SCENARIO, **wrong)


def test_what_no_way_of_rounding_is_called_and_a_scenario_that_is_no_world():
    with pytest.raises(ValueError, match="round_how must be one of nearest, up, down; got 'off'"):
        replace(SCENARIO, round_how="off")
    with pytest.raises(TypeError, match=r"world must be a World, got Scenario; scenario.make\(\) makes one"):
        sim.simulate("flashmoe", SCENARIO)
