"""The worlds that Hypothesis draws find planted bugs, and shrink to little; each property has a bug that breaks it."""

import random

import pytest
import run_properties as properties
from hypothesis import HealthCheck, Phase, find, settings
from nightly import at_night
from run_properties import broken
from watched_runs import watch_run
from world_strategies import EXAMPLES, explored_worlds, search, to

from flashmoe_numba.explore.search import watched_kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of whatever a bug computes

BROKEN_BY = {
    properties.equals_the_oracle: ("column-tile-twice", EXAMPLES["pairs are dropped"]),
    properties.combine_is_ordered: ("combine-early", EXAMPLES["token counts change"]),
    properties.every_task_runs_once: ("bound-short", EXAMPLES["token counts change"]),
    properties.every_row_is_in_one_tile: ("tile-too-tall", EXAMPLES["a packet has several row tiles"]),
    properties.flags_are_written_once: ("signal-before-data", EXAMPLES["token counts change"]),
    properties.rows_sent_are_received: ("rows-remembered", EXAMPLES["token counts change"]),
    properties.ranks_are_a_call_apart_at_most: ("epoch-not-compared", search(*[to((3, 2), 0, 2)] * 4)),
    properties.counters_add_up: ("ticket-twice", EXAMPLES["token counts change"]),
    properties.nothing_is_left_over: ("result-counted-twice", EXAMPLES["token counts change"]),
}
DRAWN = (
    "dispatch-not-acquired", "hidden-rows-shared", "empty-packet-not-signalled", "first-experts-weights",
    "counters-not-zeroed", "bound-long", "two-writers", "rows-remembered",
)  # fmt: skip
SHRINKS = settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
FINDS = settings(SHRINKS, phases=[Phase.generate])


def test_each_property_can_be_broken():
    assert set(BROKEN_BY) == set(properties.PROPERTIES)


@pytest.mark.parametrize("holds", BROKEN_BY)
def test_a_planted_bug_breaks_a_property(holds):
    plant, world = BROKEN_BY[holds]
    with watched_kernel(plant) as kernel:
        assert any(is_broken(holds, watch_run(kernel, world, seed)) for seed in range(5))


def is_broken(holds, run):
    try:
        holds(run)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("plant", DRAWN)
def test_drawn_worlds_find_a_planted_bug(plant):
    world, _ = first_bad(plant, FINDS)
    assert world.spec.given


@at_night("shrinks for half a minute")
def test_a_bad_world_shrinks_to_little():
    """The wrong expert's weights need two experts on a rank, and a token that goes to the second."""
    world, seed = first_bad("first-experts-weights", SHRINKS)
    c = world.spec.config
    assert (c.num_ranks, c.num_tokens, c.hidden, c.ffn, c.num_experts, c.num_topk) == (1, 1, 1, 1, 2, 1)
    assert (world.spec.num_processors, world.spec.lanes, world.strategy, seed) == (1, 1, "random", 0)
    assert [call.counts for call in world.spec.given] == [(1,)]


def first_bad(plant, how):
    """(search, seed) that is not clean with this bug; NoSuchExample if none is."""
    with watched_kernel(plant) as kernel:

        def is_bad(world):
            run = watch_run(kernel, *world)
            return bool(run.reports or broken(run))

        return find(explored_worlds(), is_bad, settings=how, random=random.Random(1))
