"""Worlds of forwards and backwards: what they are, what is checked in them, and what becomes of wrong ones."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from small_worlds import flashmoe

from flashmoe_numba.device.fibers import RandomStrategy
from flashmoe_numba.explore.backward_worlds import BACKWARD_WORLDS, BASE, WIDE, world
from flashmoe_numba.explore.run.program import Astray, in_words, without
from flashmoe_numba.explore.run.spec import GivenCall
from flashmoe_numba.explore.search import Explorer, Search, watched_kernel
from flashmoe_numba.explore.tell.cases import Case, load, save
from flashmoe_numba.explore.tell.shrink import smaller
from flashmoe_numba.kernel.control import OTHER_CALL, record_in
from flashmoe_numba.kernel.signals import backward_of
from reference import Task
from reference.layout import SAVES
from reference.task_kinds import ROUTER_WEIGHTS, SHARED_WEIGHTS, WEIGHTS

TWO = world(BASE, (0, 0, 2, 1))


@pytest.fixture(scope="module")
def kernel():
    with watched_kernel(None) as kernel:
        yield kernel


def one_run(kernel, spec, seed=0):
    """(explorer that has judged nothing, a run)."""
    explorer = Explorer(Search(spec=spec), kernel)
    return explorer, explorer.world.run(lambda: RandomStrategy(seed))


# ---- programs as values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(program=(0, 1, 1)), "program must have one backward of a forward, got [0, 1, 1]"),
        (dict(program=(0, 2, 0)), "program must have 0 for a forward, else the number of an earlier forward, got 2"),
        (dict(program=(0, 3, 0)), "program must have 0 for a forward, else the number of an earlier forward, got 3"),
        (dict(program=(0, 1, 2)), "program must have 0 for a forward, else the number of an earlier forward, got 2"),
        (dict(program=(0, 1)), "epochs must be the number of calls in program, 2, got 3"),
        (dict(save=None), "program needs save, which is what a forward keeps for its backward"),
        (dict(save="all"), "save must be one of rows+up, rows, nothing; got 'all'"),
        (dict(astray=(Astray(0, 2),)), "astray must be in another call than others, and a new one, got backward of 2"),
        (dict(astray=(Astray(2),)), "astray must be different ranks in [0, 1], got 2"),
        (dict(astray=(Astray(0), Astray(0))), "astray must be different ranks, and needs a program"),
        (dict(astray=(Astray(0),), leavers=(1,)), "astray must be without leavers and lost ranks"),
        (dict(program=(), frozen_router=True), "frozen_router needs a program, whose backwards it changes"),
    ],
)
def test_programs_that_there_are_not(changes, message):
    spec = world(BASE, (0, 0, 2))
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(spec, **changes)


def test_a_call_is_left_out_with_its_backward():
    assert without((0, 0, 2, 1), 1) == (0, 1)
    assert without((0, 0, 2, 1), 3) == (0, 0, 1)
    assert without((0, 1), 1) == ()
    assert in_words((0, 0, 2)) == "forward, forward, backward of 2"


def test_dy_has_the_tokens_of_its_forward():
    given = tuple(map(GivenCall, [(2, 0), (1, 2), (0, 0), (0, 0)]))
    counts = [[len(part) for part in x] for x, _ in replace(TWO, given=given).calls()]
    assert counts == [[2, 0], [1, 2], [1, 2], [2, 0]]


def test_smaller_programs():
    spec = replace(TWO, save="nothing", astray=(Astray(1),))
    found = list(smaller(spec))
    assert replace(spec, astray=()) in found and replace(spec, save="rows+up") in found
    programs = {each.program for each in smaller(replace(spec, astray=()))}
    assert programs >= {(0, 1), (0, 0, 1), (0, 0, 0, 1), (0, 0, 2, 0), (0, 0, 2), (0, 0), (0,)}
    assert replace(TWO, save=None, program=(), epochs=4) in smaller(world(BASE, (0, 0, 0, 0)))


def test_smaller_worlds_without_what_changes_backwards():
    found = list(smaller(replace(TWO, logits_gradient=True, frozen_experts=True)))
    assert replace(TWO, logits_gradient=True) in found and replace(TWO, frozen_experts=True) in found
    forwards = world(BASE, (0, 0), frozen_router=True)
    assert replace(forwards, save=None, program=(), frozen_router=False) in smaller(forwards)


def test_a_file_holds_a_program(tmp_path):
    spec = world(BASE, (0, 0, 2), "rows", astray=(Astray(1, 1),), logits_gradient=True)
    case = Case(spec=spec, plant=None, late_seed=None, schedule=(), report="")
    save(case, tmp_path / "case.json")
    assert load(tmp_path / "case.json") == case


def test_flags_make_a_program(capsys):
    flags = ["--world", "plain", "--dtype", "float64", "--save", "rows", "--program", "0,0,2", "--seeds", "2"]
    status, out, _ = flashmoe(capsys, *flags)
    assert status == 0 and "forward, forward, backward of 2 (save rows)" in out
    status, out, _ = flashmoe(capsys, *flags, "--astray", "1:1")
    assert status == 0 and "rank 1 makes a backward of 1 last" in out
    flags += ["--logits-gradient", "--frozen-experts"]
    status, out, _ = flashmoe(capsys, *flags)
    assert status == 0 and "(save rows), logits gradient, frozen experts; strategy" in out
    status, _, err = flashmoe(capsys, "--world", "plain", "--frozen-router")
    assert status == 2 and "--frozen-router needs a --program, whose backwards" in err
    for wrong in ("a", "0,", "0;1"):
        assert flashmoe(capsys, "--program", wrong)[0] == 2
    status, _, err = flashmoe(capsys, "--world", "plain", "--program", "0,1")
    assert status == 2 and "--program needs --save, which is what" in err


# ---- the named worlds


def test_named_worlds_have_what_they_should():
    found = BACKWARD_WORLDS.values()
    assert {spec.save for spec in found} == set(SAVES)
    assert {spec.lanes for spec in found} == {1, 2, 3} and {spec.packing for spec in found} == {"sources", "none"}
    assert any(spec.config.shared_gate for spec in found) and any(spec.config.num_zero for spec in found)
    assert any(spec.config.num_topk == spec.config.num_experts for spec in found)
    assert any(0 in call.counts for spec in found for call in spec.given)
    assert any(lost.call > 1 and spec.program[lost.call - 1] for spec in found for lost in spec.lost)
    assert any(spec.program[:4] == (0, 0, 2, 1) for spec in found), "two handles, used in the other order"
    assert any(spec.program == (0, 1, 0, 3) for spec in found), "gradients that go on"
    assert {own.call > 0 for spec in found for own in spec.astray} == {False, True}
    flags = {(spec.logits_gradient, spec.frozen_experts, spec.frozen_router) for spec in found}
    assert flags >= {(True, False, False), (False, True, False), (False, False, True), (True, True, True)}
    several = [spec for spec in found if spec.frozen_experts and sum(forward > 0 for forward in spec.program) > 1]
    assert any(spec.grid and spec.frozen_router for spec in found)
    assert several and any(spec.logits_gradient and spec.config.router_kind.logit_bias for spec in found)


@pytest.mark.parametrize("name", BACKWARD_WORLDS)
def test_the_kernel_is_clean(kernel, name):
    explorer = Explorer(Search(spec=BACKWARD_WORLDS[name]), kernel)
    for seed in range(2):
        assert explorer.run(seed).reports == [], f"seed {seed}"


def test_pairs_are_dropped_and_tiles_have_rows_of_several_sources(kernel):
    _, run = one_run(kernel, BACKWARD_WORLDS["back through drops"])
    rows = sum(int(calls[1].rows.sum()) for calls in run.calls)
    assert rows < sum(int((calls[1].routing.topk_idx >= 0).sum()) for calls in run.calls)
    several = [
        len(tile.runs) > 1
        for seed in range(4)
        for calls in one_run(kernel, BACKWARD_WORLDS["rows kept"], seed)[1].calls
        for tiles in calls[1].tiles
        for tile in tiles
    ]
    assert set(several) == {False, True}


def test_a_room_is_taken_again(kernel):
    """As layers do it: the third forward keeps its rows where the first one's were, which had its backward."""
    explorer, run = one_run(kernel, world(BASE, (0, 1, 0, 3)))
    assert explorer.checker.check(run) == []
    rooms = {name for region in explorer.world.regions.values() if "kept_rows of" in (name := region.name)}
    assert rooms == {f"rank {rank} kept.kept_rows of room 1" for rank in range(2)}


# ---- what is checked


def test_tasks_of_a_backward(kernel):
    spec = world(BASE | dict(shared_ffn=2, shared_gate=True), (0, 1))
    _, run = one_run(kernel, spec)
    kinds = Counter(task.kind for calls in run.calls for task in calls[1].tasks)
    busy = sum(int((calls[1].rows.sum(axis=0) > 0).sum()) for calls in run.calls)
    assert (kinds[WEIGHTS], kinds[ROUTER_WEIGHTS], kinds[SHARED_WEIGHTS]) == (2 * busy, 2, 2 * 3)


def test_frozen_weights_have_no_tasks_and_no_gradients(kernel):
    sizes, kinds = BASE | dict(shared_ffn=2), {}
    for name in ("frozen_experts", "frozen_router"):
        explorer, run = one_run(kernel, world(sizes, (0, 1), **{name: True}))
        assert explorer.checker.check(run) == []
        (gradients,) = {tuple(key for key, array in calls[1].gradients.items() if array.size) for calls in run.calls}
        kinds[name] = {task.kind for calls in run.calls for task in calls[1].tasks}
        assert ("down" in gradients, "router" in gradients) == (name == "frozen_router", name == "frozen_experts")
    assert kinds["frozen_experts"] ^ kinds["frozen_router"] == {WEIGHTS, SHARED_WEIGHTS, ROUTER_WEIGHTS}


def test_gradients_of_logits_come_in_where_the_router_chose(kernel):
    spec = world(BASE, (0, 1), logits_gradient=True)
    explorer, run = one_run(kernel, spec)
    assert explorer.checker.check(run) == []
    plain = one_run(kernel, replace(spec, logits_gradient=False))[1]
    for rank, (one, other) in enumerate(zip(run.calls, plain.calls, strict=True)):
        said = explorer.world.said(rank, 2)
        np.testing.assert_allclose(one[1].gradients["logits"], other[1].gradients["logits"] + said, rtol=1e-14)
    routed = replace(spec, given=(GivenCall((2, 2), (((0,), (1,)), ((1,), (0,)))),) * 2)
    assert one_run(kernel, routed)[0].world.said(0, 2) is None


def test_a_first_backward_begins_with_whatever_there_is(kernel):
    """In worlds that is NaN, but for experts without rows, which the host clears."""
    spec = world(BASE, (0, 1, 0, 3), given=(GivenCall((2, 1), (((0,), (0,)), ((0,),))),) * 4)
    explorer, run = one_run(kernel, spec)
    assert explorer.checker.check(run) == []
    assert not run.calls[1][1].gradients["up"].any(), "expert 1 has no rows"
    assert [spec.begins_sums(0, call) for call in (1, 2, 3, 4)] == [False, True, False, False]


@pytest.mark.parametrize("name", ["up", "down_bias", "router", "topk_weights", "logits", "x"])
def test_a_gradient_that_is_off_is_told(kernel, name):
    explorer, run = one_run(kernel, TWO)
    call = run.calls[1][2]
    array = call.y if name == "x" else call.gradients[name]
    array.reshape(-1)[1] += 1e-9
    (report,) = explorer.checker.check(run)
    where = "call 3" if name == "router" else "rank 1, call 3"
    assert report.kind == "wrong result" and report.text.startswith(f"{where}: gradient {name}[1] is ")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_gradients_have_bounds(kernel, dtype):
    explorer, run = one_run(kernel, world(BASE | dict(dtype=dtype), (0, 1, 0, 3)))
    assert explorer.checker.check(run) == []
    fresh, run = one_run(kernel, explorer.world.spec)
    array = run.calls[0][3].gradients["down"]
    array[1] += 0.1 * np.abs(array).max()
    (report,) = fresh.checker.check(run)
    assert report.text.startswith("rank 0, call 4: gradient down[1] is ")


def test_other_bits_are_told(kernel):
    explorer, run = one_run(kernel, TWO)
    assert explorer.checker.check(run) == []
    again = explorer.world.run(lambda: RandomStrategy(1))
    array = again.calls[0][3].gradients["up"]
    array[2] = np.nextafter(array[2], np.inf)
    (report,) = explorer.checker.check(again)
    assert report.text == "rank 0, call 4: gradient up[2] has other bits than under another seed"


def test_a_routing_of_another_forward_is_told(kernel):
    explorer, run = one_run(kernel, TWO)
    call = run.calls[0][3]
    call.routing.topk_idx[:] = 1 - call.routing.topk_idx
    (report,) = explorer.checker.check(run)
    assert report.text == "rank 0, call 4: routed otherwise than in its forward"


def test_what_another_call_kept_is_noticed(kernel):
    """A host that takes the other handle on both ranks: no packet differs, all else does."""
    explorer = Explorer(Search(spec=replace(TWO, given=(GivenCall((2, 2)),) * 4)), kernel)
    whole = explorer.world.begin_call

    def other(rank, call, deadline, kept):
        return whole(rank, call, deadline, kept if call < 3 else {1: kept[2], 2: kept[1]})

    explorer.world.begin_call = other
    kinds = {report.kind for report in explorer.run(0).reports}
    assert "wrong result" in kinds


def test_a_task_too_many_is_told(kernel):
    explorer, run = one_run(kernel, TWO)
    run.calls[0][2].tasks[Task(WEIGHTS, 0, 1, 0, 0, 0)] += 1
    (report,) = explorer.checker.check(run)
    assert report.kind == "count" and "WEIGHTS(rank=0, peer=1, expert=0, m=0, n=0) ran 2 times, wanted 1" in report.text


# ---- calls that differ


@pytest.mark.parametrize("own", [Astray(1), Astray(0, 1)])
def test_all_ranks_are_told_of_another_call(kernel, own):
    explorer = Explorer(Search(spec=world(BASE | dict(num_ranks=3, num_experts=3), (0, 0, 2), astray=(own,))), kernel)
    for seed in range(5):
        assert explorer.run(seed).reports == [], f"seed {seed}"
        segments = [rank.segments for rank in explorer.world.ranks]
        named = {int(each.control[0]) - 1 for each in segments}
        assert len(named) == 1, "one rank, by all"
        record = record_in(segments[named.pop()].control)
        assert (record.flag, record.epoch) == (OTHER_CALL, 3)
        assert own.rank in named or record.m in (0, backward_of(1), backward_of(2))


def test_a_record_of_no_call_is_told(kernel):
    """One that says that its rank made another call than it did."""
    explorer = Explorer(Search(spec=world(BASE, (0, 1), astray=(Astray(1),))), kernel)
    blame = explorer.world.blame
    true = blame._spec
    blame._spec = replace(true, astray=(), program=(0, 0), save="rows")
    assert {report.kind for report in explorer.run(0).reports} == {"blame"}


def test_wide_worlds_have_several_column_tiles():
    config = world(WIDE, (0, 1)).config
    assert -(-config.ffn // config.tile_ffn) == 3 and -(-config.hidden // config.tile_n) == 2
