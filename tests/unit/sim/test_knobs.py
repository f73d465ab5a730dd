"""Knobs of every policy at the ends of their ranges: no number is silently another one."""

from dataclasses import fields

import pytest
from policy_worlds import small_world

from sim.policies import POLICY_NAMES, make_knobs
from sim.reading.report import report
from sim.simulation import simulate


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_whole_numbers_beyond_32_bits_are_refused(policy):
    for field in fields(make_knobs(policy, {})):
        if "int" in str(field.type):
            with pytest.raises(ValueError, match=f"{field.name} must be at most 2147483647, got 2147483648"):
                make_knobs(policy, {field.name: 2**31})


@pytest.mark.parametrize("knobs", [{"tile_m": 64}, make_knobs("bulk", {})])
def test_knobs_of_another_kind_are_refused(knobs):
    with pytest.raises(TypeError, match=r"^knobs must be of policy flashmoe, such as .*; got "):
        simulate("flashmoe", small_world(), knobs)


def test_shares_of_more_slots_than_tasks_by_far_add_up():
    shares = report(simulate("flashmoe", small_world(), make_knobs("flashmoe", {"blocks_per_sm": 10**8})))
    assert shares.resident + sum(shares.idle.values()) == pytest.approx(1, abs=1e-9)
    assert min(shares.idle.values()) >= 0
