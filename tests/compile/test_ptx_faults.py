"""A few faults planted in a linked kernel are found: one of each rule, in the fast profile of some rules.

All of them: make ptx-faults.
"""

import importlib.util
import os
import signal
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from built_variants import IS_FAST

if not importlib.util.find_spec("numba_cuda"):
    pytest.skip("numba-cuda is not installed: pip install 'flashmoe-numba[compile]'", allow_module_level=True)

import ptx_fault_runs
from ptx_fault_rules import RULES, SCOPES, Plant, plants, sites
from ptx_fault_runs import ALONE, FAULT, HANG, MANY_TILES, VARIANTS, WRONG, UnhealthyWorld, healthy, judge, text_of
from ptx_faults_explained import reason
from ptx_faults_text import BEFORE, BEFORE_GATE, FIRST, LANE_0, MORE, NEGATIVE, NEXT, ONE_MAP, SMALL
from ptx_faults_words import fields_of
from ptx_processes import Processes

VARIANT = VARIANTS[1].name  # all rules fit it
# In the fast profile one rule for each thing that the machine keeps: order in a block and between blocks, scopes,
# proxies, mbarriers, and what wgmma has not finished.
FAST_RULES = (
    "a barrier removed",
    "`.release` removed",
    SCOPES,
    "a proxy fence removed",
    "an `expect_tx` count changed",
    "a `wait_group` number raised",
)
CHOSEN = FAST_RULES if IS_FAST else tuple(RULES)
WORLDS = (1, 10, MANY_TILES)  # quick ones, and one in which several blocks meet


@pytest.fixture(scope="module", autouse=True)
def kernels_of_this_session(folder):
    """None is linked again."""
    with mock.patch.object(ptx_fault_runs, "usable_cache_folder", return_value=folder):
        yield


@pytest.fixture(scope="module")
def worlds():
    """They are healthy without a plant, under all schedules."""
    return [healthy(VARIANT, number) for number in WORLDS]


@pytest.mark.parametrize("rule", CHOSEN)
def test_a_planted_fault_is_found(rule, worlds):
    """One of the first plants of a rule that are executed, and that no reason hides: these worlds do not find each."""
    executed = {line for world in worlds for line in world.lines}
    lines = text_of(VARIANT).split("\n")
    able = [
        p for p in plants(VARIANT, text_of(VARIANT)) if p.rule == rule and p.line in executed and not reason(p, lines)
    ]
    assert any(judge(plant, worlds).verdict in (FAULT, WRONG, HANG, ALONE) for plant in able[:4])


@pytest.mark.parametrize("what", ["fails", "has other bits"])
def test_a_world_that_is_not_healthy_is_an_error_that_names_it_and_its_schedule(what, monkeypatch):
    """Under one schedule only."""

    def run(world, text, seed, num_processors):
        if what == "fails" and num_processors == 3:
            raise AssertionError("another y")
        return SimpleNamespace(results=[[{"y": np.zeros(1) + (num_processors == 3)}]])

    monkeypatch.setattr(ptx_fault_runs, "run_world", run)
    monkeypatch.setattr(ptx_fault_runs, "text_of", lambda name: "")
    why = "AssertionError: another y" if what == "fails" else "bits differ from those of its own seed"
    rule = rf"{VARIANT} world 1 \(seed 1\) fails without a plant on seed 2, 3 processors: {why}"
    with pytest.raises(UnhealthyWorld, match=rule):
        healthy(VARIANT, 1)


def killed(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.timeout(60)
def test_a_process_that_is_killed_ends_the_run():
    with Processes(2, "fork") as processes:
        assert sorted(processes.each(killed, range(3))) == [0, 1, 2]
        with pytest.raises(RuntimeError, match="a process died"):
            list(processes.each(killed, range(5)))


def test_rules_fit_what_they_are_for():
    """Each line of a small text, and what the rules make of it."""
    text = """bar.sync \t0;
@lead fence.proxy.tensormap::generic.acquire.sys [a], 128;
st.release.sys.b64 [%rd1], %rd2;
atom.add.acq_rel.sys.u64 %rd1, [%rd2], %rd3;
@go mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 64;
\t@%p1 bra L;
ld.global.f32 %f1, [%rd1+-4];"""
    apart = "ld.acquire.sys.b64 %rd1, [%rd2]; add.s64 sum, %rd1, %rd3; st.release.sys.b64 [%rd2], sum;"
    found = {(rule, line, other) for rule in RULES for line, _, other in sites(text, rule)}
    assert found == {
        ("a barrier removed", 1, ""),
        ("a proxy fence removed", 2, ""),
        ("a predicate removed", 2, "fence.proxy.tensormap::generic.acquire.sys [a], 128;"),
        ("`.release` removed", 3, "st.relaxed.sys.b64 [%rd1], %rd2;"),
        ("`.sys` made `.gpu`", 3, "st.release.gpu.b64 [%rd1], %rd2;"),
        ("`.release` removed", 4, "atom.add.acquire.sys.u64 %rd1, [%rd2], %rd3;"),
        ("`.acquire` removed", 4, "atom.add.release.sys.u64 %rd1, [%rd2], %rd3;"),
        ("`.sys` made `.gpu`", 4, "atom.add.acq_rel.gpu.u64 %rd1, [%rd2], %rd3;"),
        ("an addition not atomic", 4, f"{{ .reg .b64 sum; {apart} }}"),
        ("an `expect_tx` count changed", 5, "@go mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 80;"),
        ("an `expect_tx` count changed", 5, "@go mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 48;"),
        ("a predicate removed", 5, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 64;"),
        ("a branch inverted", 6, "\t@!%p1 bra L;"),
        ("an offset wrong", 7, "ld.global.f32 %f1, [%rd1+0];"),
    }


# ---- reasons by the text around a line: (rule, text, the first line's number, why); FIELD is replaced by its offset

DIVISION = """ld.global.u64 %rd2, [%rd16+{problem.num_topk}];
or.b64 %rd3, %rd1, %rd2;
and.b64 %rd4, %rd3, -4294967296;
setp.eq.s64 %p1, %rd4, 0;
@%p1 bra L;"""
MAPS = """ld.global.u64 %rd1, [%rd16+{experts.down.maps}];
add.s64 %rd2, %rd1, %rd3;
@lead fence.proxy.tensormap::generic.acquire.sys [%rd1], 128;
@lead fence.proxy.tensormap::generic.acquire.sys [%rd2], 128;
@lead fence.proxy.tensormap::generic.acquire.sys [rowmap], 128;"""
SIZE = """ld.global.u64 %rd1, [%rd16+904];
shr.s64 %rd3, %rd2, 63;
and.b64 %rd4, %rd3, %rd1;"""
ROUNDS = """L:
bar.sync 0;
mov.pred %p2, -1;
st.f32 [%rd1], %f1;
bar.sync 0;
setp.lt.s64 %p1, %rd2, %rd3;
@%p1 bra L;
not.pred %p3, %p2;
@%p3 bra M;
bar.sync 0;
M:
st.f32 [%rd1], %f1;
ret;"""
SKIPPED = """bar.sync 0;
selp.b64 %rd2, %rd1, 0, %p1;
setp.eq.s64 %p2, %rd2, 0;
@%p2 bra L;
bar.sync 0;
L:
st.shared.f32 [%rd3], %f1;
ret;"""
RESERVED = """ld.acquire.sys.b64 %rd1, [%rd2];
ld.global.u64 %rd4, [%rd16+{queue.counters}];
add.s64 %rd5, %rd4, 128;
atom.add.acq_rel.sys.u64 %rd6, [%rd5], 1;
@%p1 bra L;
st.u64 [%rd6], %rd7;
L:
ld.global.u64 %rd8, [%rd16+{queue.counters}];
add.s64 %rd9, %rd8, 384;
st.release.sys.b64 [%rd9], 1;
bar.sync 0;
ret;"""
ADDED = """ld.global.u64 %rd2, [%rd16+{traces}];
mov.u32 %r1, %tid.x;
setp.ne.s32 %p1, %r1, 0;
@%p1 bra L;
atom.add.acq_rel.sys.u64 %rd1, [%rd2], %rd3;"""
BY_TEXT = {
    "a few choices": ("a branch inverted", DIVISION, 5, SMALL),
    "a tile's rows may be many": ("a branch inverted", DIVISION.replace("num_topk", "tile_m"), 5, None),
    "another branch": ("a branch inverted", DIVISION.replace("-4294967296", "-2"), 5, None),
    "a map of the down projection": ("a proxy fence removed", MAPS, 3, ONE_MAP),
    "the other half's": ("a proxy fence removed", MAPS, 4, ONE_MAP),
    "the map of rows": ("a proxy fence removed", MAPS, 5, None),
    "the other half's is not fenced": ("a proxy fence removed", MAPS.replace("[%rd2], 128", "[rowmap], 128"), 3, None),
    "the up projection's are two": ("a proxy fence removed", MAPS.replace("down", "up"), 3, None),
    "a fence of all": ("a predicate removed", MAPS, 3, MORE),
    "an inval of all": ("a predicate removed", "@lead mbarrier.inval.shared::cta.b64 [barriers+0];", 1, None),
    "a size": ("an offset wrong", SIZE, 1, NEGATIVE),
    "a size that is used": ("an offset wrong", SIZE + "\nadd.s64 %rd5, %rd1, 1;", 1, None),
    "a size of which bits are taken": ("an offset wrong", SIZE.replace("63", "3"), 1, None),
    "a round's last barrier": ("a barrier removed", ROUNDS, 5, NEXT),
    "the barrier behind": ("a barrier removed", ROUNDS, 10, BEFORE),
    "a round's first barrier": ("a barrier removed", ROUNDS, 2, None),
    "the way out stores": ("a barrier removed", ROUNDS.replace("not.pred %p3, %p2;", "st.f32 [%rd1], %f1;"), 5, None),
    "a round begins with a store": ("a barrier removed", ROUNDS.replace("L:\n", "L:\nst.f32 [%rd1], %f1;\n"), 6, None),
    "a loop that has a round": ("a barrier removed", SKIPPED, 1, NEXT),
    "a branch around a barrier": ("a barrier removed", SKIPPED.replace("%rd1, 0,", "%rd1, 1,"), 1, None),
    "one lane adds": ("an addition not atomic", ADDED, 5, LANE_0),
    "all lanes add": ("an addition not atomic", ADDED.replace("@%p1 bra L;", "L:"), 5, None),
    "to another word": ("an addition not atomic", ADDED.replace("traces", "left"), 5, None),
    "the gate's block reserves": ("an addition not atomic", RESERVED, 4, BEFORE_GATE),
    "the gate may be open": ("an addition not atomic", RESERVED.replace("[%rd9]", "[%rd5]"), 4, None),
    "a way around the gate": ("an addition not atomic", RESERVED.replace("bra L", "bra M") + "\nM:\nret;", 4, None),
    "the first thing": ("an addition not atomic", RESERVED.replace("ld.acquire", "ld.relaxed"), 4, FIRST),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_TEXT)
def test_a_reason_is_read_from_the_text(name):
    rule, text, line, why = BY_TEXT[name]
    for at, field in fields_of(VARIANT).items():
        text = text.replace(f"{{{field}}}", str(at))
    lines = text.split("\n")
    plant = Plant(variant=VARIANT, rule=rule, line=line, what="", instead="", was=lines[line - 1])
    assert reason(plant, lines) == why
