"""Worlds in which waits have a deadline: who gives up, when, and, where the schedule is fair, whom it names."""

from collections import Counter
from dataclasses import replace

import pytest
from cases import record_word, record_words
from small_worlds import flashmoe, spec

from flashmoe_numba.explore.run.spec import Lost
from flashmoe_numba.explore.search import Explorer, Search, watched_kernel
from flashmoe_numba.explore.worlds import WORLDS
from flashmoe_numba.kernel import control as s

LOST = [name for name, world in WORLDS.items() if world.lost]
BETWEEN = WORLDS["lost between two"]
TICKET_OF_ITS_OWN = dict(zip(record_words("role", "flag", "peer"), (s.PROCESSOR, s.TASK_FLAG, 0), strict=True))


@pytest.fixture(scope="module")
def kernel():
    with watched_kernel(None) as kernel:
        yield kernel


def names(world):
    """Whom each rank's complete record names; None: it has none."""
    controls = [rank.control for rank in world.ranks]
    return [int(control[record_word("peer")]) if control[s.RECORD] == s.COMPLETE else None for control in controls]


@pytest.mark.parametrize("strategy", ["random", "pct", "round-robin"])
@pytest.mark.parametrize("name", LOST)
def test_a_lost_rank_is_named(kernel, name, strategy):
    world = WORLDS[name]
    explorer, fair = Explorer(Search(spec=world, strategy=strategy), kernel), 0
    for seed in range(4):
        assert explorer.run(seed).reports == [], f"seed {seed}"
        named = set(names(explorer.world)) - {None}
        assert named, f"seed {seed}: nobody gave up"
        if any(explorer.world.blame.is_fair(rank) for rank in range(world.config.num_ranks)):
            fair += 1
            assert named <= {lost.rank for lost in world.lost}, f"seed {seed}: {named}"
    assert fair > 0 or strategy != "pct", "there all that wait take turns"


def test_a_rank_that_is_a_call_ahead_names_the_lost_one_not_the_one_behind(kernel):
    explorer, ahead = Explorer(Search(spec=BETWEEN, strategy="pct"), kernel), 0
    for seed in range(10):
        assert explorer.run(seed).reports == []
        control = explorer.world.ranks[0].control
        if control[s.RECORD] == s.COMPLETE and control[record_word("epoch")] == 2:
            ahead += 1
            assert control[record_word("peer")] == 2, f"seed {seed}"
    assert ahead > 0


@pytest.mark.parametrize("strategy", ["random", "round-robin"])
def test_ranks_that_are_all_there_give_up_after_a_silence_only(kernel, strategy):
    """With a deadline of a few turns some waits fail: none of them is told off."""
    gave_up = Counter()
    for deadline in (100, 1000):
        world = replace(WORLDS["short of time"], deadline=deadline)
        explorer = Explorer(Search(spec=world, strategy=strategy), kernel)
        for seed in range(24):
            assert explorer.run(seed).reports == [], f"deadline {deadline}, seed {seed}"
            gave_up[deadline] += any(who is not None for who in names(explorer.world))
    assert gave_up[100] > 0
    assert gave_up[1000] == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({}, None),
        ({0: {s.ABORT: 2}}, "rank 0 names rank 1, rank 1 names rank 0, rank 2 names rank 0"),
        ({2: {s.ABORT: 0}}, "rank 0 names rank 0, rank 1 names rank 0, rank 2 names nobody"),
        ({0: {s.RECORD: s.WRITING}, 1: {s.RECORD: 0}}, "rank 0 names rank 0, rank 1 names rank 0, rank 2 names rank 0"),
        ({0: {record_word("peer"): 1}}, "rank 0 blames rank 1 for flag 0 in call 2, which was not lost"),
        ({0: TICKET_OF_ITS_OWN}, "rank 0 blames rank 0"),
        ({0: {record_word("found"): 77}}, "rank 0 blames rank 2 for flag 0 of 77, but it is"),
        ({0: {record_word("peer"): 1}, 2: {s.SILENT: 1}}, None),
    ],
)
def test_what_is_left_when_all_has_ended(kernel, words, told):
    """A clean run in which rank 0 was the first, with other words in the end."""
    explorer = Explorer(Search(spec=BETWEEN, strategy="pct"), kernel)
    seed = next(seed for seed in range(20) if is_first(explorer, seed))
    assert explorer.world.blame.compare() is None, f"seed {seed}"
    for rank, values in words.items():
        for i, value in values.items():
            explorer.world.ranks[rank].control[i] = value
    found = explorer.world.blame.compare()
    assert found == told or (told and found and found.startswith(told)), found


def is_first(explorer, seed):
    explorer.run(seed)
    control = explorer.world.ranks[0].control
    return control[s.ABORT] == 1 and control[record_word("epoch")] == 2 and explorer.world.blame.is_fair(0)


def test_a_rank_is_lost_where_it_should_be(kernel):
    """After so many of its tasks; in a call before the last one, too; and with no task it never begins."""
    for lost in (Lost(1, 1, 0), Lost(1, 1, 3), Lost(1, 2, 1)):
        explorer = Explorer(Search(spec=replace(WORLDS["never comes"], lost=(lost,))), kernel)
        calls = explorer.world.run(explorer.strategy(0), 0).calls[1]
        assert len(calls) == lost.call - 1
        done = int(explorer.world.ranks[1].control[s.PROGRESS])
        assert done == lost.tasks + sum(call.tasks.total() for call in calls)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lost=(Lost(2, 1),)), r"lost must be different ranks in \[0, 1\], got 2"),
        (dict(lost=(Lost(1, 3),), deadline=200), r"lost must be in a call in \[1, epochs=2\], .* got call 3, 0 tasks"),
        (dict(lost=(Lost(1, 1),)), "lost needs a deadline"),
        (dict(lost=(Lost(1, 1),), leavers=(1,), deadline=200), "lost must be none of the leavers, got 1"),
        (dict(deadline=99), "deadline must be at least 100 switches, got 99"),
        (dict(grid=True, deadline=200), "grid must be without leavers and without a deadline"),
    ],
)
def test_worlds_that_there_are_not(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(spec(), **changes)


def test_a_lost_rank_from_the_command_line(capsys):
    status, out, _ = flashmoe(capsys, "--world", "never comes", "--lost", "0:1:2", "--seeds", "2")
    assert status == 0
    assert ", rank 0 is lost in call 1 after 2 tasks, deadline 1000; strategy random" in out
    status, _, err = flashmoe(capsys, "--world", "never comes", "--lost", "0:1:2:3")
    assert (status, "must be RANK, RANK:CALL or RANK:CALL:TASKS, got '0:1:2:3'" in err) == (2, True)
