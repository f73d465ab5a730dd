"""A few faults planted in a linked kernel, one a rule, are found (all of them: make ptx-faults)."""

import importlib.util

import pytest

if not importlib.util.find_spec("numba_cuda"):
    pytest.skip("numba-cuda is not installed: pip install 'flashmoe-numba[compile]'", allow_module_level=True)

from ptx_faults import ALONE, FAULT, HANG, MANY_TILES, RULES, VARIANTS, WRONG, healthy, judge, plants, sites, text_of
from ptx_faults_explained import reason

VARIANT = VARIANTS[1].name  # all rules fit it
WORLDS = (1, 10, MANY_TILES)  # quick ones, and one in which several blocks meet


@pytest.fixture(scope="module")
def worlds():
    """They are healthy without a plant, under all schedules."""
    found = [healthy(VARIANT, number) for number in WORLDS]
    assert None not in found
    return found


@pytest.mark.parametrize("rule", RULES)
def test_a_planted_fault_is_found(rule, worlds):
    """One of the first plants of a rule that are executed, and that no reason hides: these worlds do not find each."""
    executed = {line for world in worlds for line in world.lines}
    lines = text_of(VARIANT).split("\n")
    able = [
        p for p in plants(VARIANT, text_of(VARIANT)) if p.rule == rule and p.line in executed and not reason(p, lines)
    ]
    assert any(judge(plant, worlds).verdict in (FAULT, WRONG, HANG, ALONE) for plant in able[:4])


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
