"""Whole worlds under the explorer: any layer, any calls, any schedule, and everything that must hold in a run."""

import pytest
from cases import assert_same_bits
from hypothesis import event, given, settings, target
from watched_runs import CASES, check_run, happened, watch_run
from world_strategies import explored_worlds, schedules

from flashmoe_numba.explore.search import Search, watched_kernel
from flashmoe_numba.explore.world import GivenCall, WorldSpec
from reference import MoEConfig

few = settings(max_examples=max(5, settings().max_examples // 5))

TINY = dict(
    num_ranks=2, num_tokens=3, hidden=3, ffn=3, num_experts=4, num_topk=2, gated=True, activation="silu",
    tile_m=2, tile_m_min=2, tile_n=2, token_block=2,
)  # fmt: skip


def search(*calls, strategy="random", num_processors=2, lanes=1, **changes):
    config = MoEConfig(**(TINY | changes))
    world = WorldSpec(config=config, num_processors=num_processors, lanes=lanes, epochs=len(calls), given=calls)
    return Search(spec=world, strategy=strategy)


def to(experts, *counts):
    """A call in which all tokens go to the same experts."""
    return GivenCall(counts, tuple((experts,) * count for count in counts))


EXAMPLES = {
    "a rank sends nothing": (search(GivenCall((0, 2)), lanes=2), 0),
    "a rank receives nothing": (search(to((1, 0), 2, 1)), 0),
    "nobody sends anything": (search(GivenCall((0, 0)), GivenCall((0, 0)), num_processors=1), 0),
    "token counts change": (search(*map(GivenCall, [(3, 0), (0, 3), (1, 3), (3, 3)])), 0),
    "all tokens go to one expert": (search(to((2,), 3, 3), num_topk=1, lanes=3), 0),
    "pairs are dropped": (search(to((0, 3), 2, 2), capacity=1), 0),
    "a token loses all its experts": (search(to((0, 3), 3, 3), capacity=1, token_block=1), 0),
    "a packet has several row tiles": (search(to((0, 3), 3, 3), num_processors=3), 0),
    "a rank is a call ahead of another": (search(to((3, 2), 0, 2), GivenCall((3, 1)), num_processors=1), 0),
    "an empty packet's signal is overtaken": (
        search(to((3, 2), 0, 2), GivenCall((3, 1)), to((3, 2), 0, 1), strategy="pct", num_processors=1), 1,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def kernel():
    with watched_kernel(None) as kernel:
        yield kernel


@settings(max_examples=max(5, settings().max_examples // 3))
@given(explored_worlds())
def test_everything_holds(kernel, world):
    run = watch_run(kernel, *world)
    check_run(run)
    for case in happened(run):
        event(case)
    target(float(run.story.overtaken), label="overtaken signals")


@pytest.mark.parametrize("case", CASES)
def test_the_cases_that_matter_do_happen(kernel, case):
    run = watch_run(kernel, *EXAMPLES[case])
    check_run(run)
    assert case in happened(run)


@few
@given(explored_worlds(max_ranks=3, max_calls=2), schedules())
def test_bits_do_not_depend_on_the_schedule(kernel, world, other):
    (one, seed), (schedule, other_seed) = world, other
    runs = watch_run(kernel, one, seed), watch_run(kernel, Search(spec=one.spec, **schedule), other_seed)
    for call, pair in enumerate(zip(*(run.calls for run in runs), strict=True), start=1):
        assert_same_bits(*([rank.y for rank in ranks] for ranks in pair), f"call {call}")
