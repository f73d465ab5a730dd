"""Whole worlds under the explorer: any layer, any calls, any schedule, and everything that must hold in a run."""

import pytest
from cases import assert_same_bits
from hypothesis import event, given, settings, target
from run_properties import check_run
from watched_runs import CASES, happened, watch_run
from world_strategies import EXAMPLES, explored_worlds, schedules, specs_of_programs

from flashmoe_numba.explore.search import Explorer, Search, watched_kernel

NUM_SEEDS = 50  # two calls tell of an empty packet at a time in about a quarter of them; all else happens in the first
few = settings(max_examples=max(5, settings().max_examples // 5))


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
    target(float(run.story.at_a_time), label="signals of two calls")


@settings(max_examples=max(5, settings().max_examples // 3))
@given(specs_of_programs(max_ranks=3, max_calls=5, max_tokens=3), schedules(), schedules())
def test_backwards_are_clean_and_have_the_same_bits_under_every_schedule(kernel, spec, one, other):
    target(float(sum(forward > 0 for forward in spec.program)), label="backwards")
    calls = []
    for schedule, seed in (one, other):
        explorer = Explorer(Search(spec=spec, **schedule), kernel)
        run = explorer.world.run(explorer.strategy(seed), explorer.late_seed(seed))
        assert explorer.checker.check(run) == []
        calls.append([call for of_rank in run.calls for call in of_rank])
    assert len(calls[0]) == spec.epochs * spec.config.num_ranks
    for number, (first, second) in enumerate(zip(*calls, strict=True)):
        for name, array in first.gradients.items():
            assert_same_bits(array, second.gradients[name], f"{name}, call {number % spec.epochs + 1}")


@pytest.mark.parametrize("case", CASES)
def test_the_cases_that_matter_do_happen(kernel, case):
    for seed in range(NUM_SEEDS):
        run = watch_run(kernel, EXAMPLES[case], seed)
        check_run(run)
        if case in happened(run):
            return
    pytest.fail(f"did not happen in {NUM_SEEDS} schedules")


@few
@given(explored_worlds(max_ranks=3, max_calls=2), schedules())
def test_bits_do_not_depend_on_the_schedule(kernel, world, other):
    (one, seed), (schedule, other_seed) = world, other
    runs = watch_run(kernel, one, seed), watch_run(kernel, Search(spec=one.spec, **schedule), other_seed)
    for call, pair in enumerate(zip(*(run.calls for run in runs), strict=True), start=1):
        assert_same_bits(*([rank.y for rank in ranks] for ranks in pair), f"call {call}")
