"""Ranks as processes, one of them killed, stopped or slowed down at a random moment: experiments/lost, a few runs each.

Nothing here is timed: an error may take as long as the machine lets it, and only a hang (half a minute) is too late.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from flashmoe_numba import FlashMoE
from flashmoe_numba.layer.life import Life

sys.path.append(str(Path(__file__).parents[3] / "experiments"))
from lost.faults import FAULTS
from lost.lose import lose_one
from lost.memory import AFTER, PLACES, Memory
from lost.rank import giving_up
from lost.run import running
from lost.world import make_trial

NUM_RUNS, NUM_RANKS, DEADLINE_S, ANY_TIME_S = 2, 3, 0.3, 1e9


@pytest.fixture(scope="module")
def world():
    return make_trial(NUM_RANKS, num_calls=10, deadline_s=DEADLINE_S)


@pytest.fixture(scope="module")
def world_of_backwards():
    return make_trial(NUM_RANKS, num_calls=10, deadline_s=DEADLINE_S, save="rows+up")


@pytest.mark.parametrize("calls", ["world", "world_of_backwards"])
@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "none"])
def test_every_rank_has_the_right_results_or_an_error_with_a_name(fault, calls, request):
    for seed in range(NUM_RUNS):
        verdict = lose_one(request.getfixturevalue(calls), FAULTS[fault], np.random.default_rng(seed), ANY_TIME_S)
        assert verdict.problems == [], "\n".join(verdict.problems)
        assert verdict.right + verdict.named + len(verdict.other) >= NUM_RANKS - 2
        assert set(verdict.fell) <= set(PLACES)


@pytest.mark.parametrize("save", [None, "nothing"])
def test_ranks_that_nobody_disturbs_are_right_and_nothing_is_left(save):
    with running(make_trial(NUM_RANKS, num_calls=10, deadline_s=60, save=save), np.random.default_rng(0)) as run:
        run.wait_for_all()
        assert [run.memory.place(rank) for rank in range(NUM_RANKS)] == [AFTER] * NUM_RANKS
    for pid in run.pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_giving_up_store_by_store_is_what_a_host_that_leaves_does(world):
    memory = Memory(world.config)
    for step in giving_up(memory, 1, epoch=3):
        step()
    with FlashMoE(world.config, world.weights, num_processors=1, backend="fibers") as layer:
        layer._backend.leave(*layer._ranks[1].leaving(3))
        for rank in layer._ranks:
            assert rank.control.tolist() == memory.control(rank.rank_idx).tolist(), f"rank {rank.rank_idx}"


def test_a_host_that_does_not_look_whether_its_call_was_given_up_is_found_out(monkeypatch, world):
    monkeypatch.setattr(Life, "raise_if_given_up", lambda life: None)
    problems = []
    for seed in range(4):
        problems += lose_one(world, FAULTS["kill"], np.random.default_rng(seed), ANY_TIME_S).problems
    assert any("wrong" in problem for problem in problems), problems
