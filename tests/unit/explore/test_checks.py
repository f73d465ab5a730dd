"""What a bug has spoilt is a report, whatever the values are: the checks themselves never raise."""

from dataclasses import replace

import numpy as np
import pytest

from flashmoe_numba.device.fibers import RandomStrategy
from flashmoe_numba.explore.run.spec import WorldSpec
from flashmoe_numba.explore.search import Explorer, Search, watched_kernel
from flashmoe_numba.kernel.signals import EPOCH_SHIFT
from reference import MoEConfig, Task

CONFIG = MoEConfig(num_ranks=2, num_tokens=3, hidden=5, ffn=3, num_experts=4, num_topk=2, tile_m=4, tile_m_min=2)
EXPERTS = [
    ([[0, 3], [4, 1], [2, 0]], "token 1 goes to expert 4 of [4, 1]: not in [0, 4), or twice"),
    ([[-1, 3], [4, 1], [2, 0]], "token 0 goes to expert -1 of [-1, 3]: not in [0, 4), or twice"),
    ([[0, 3], [0, 1], [2, 2]], "token 2 goes to expert 2 of [2, 2]: not in [0, 4), or twice"),
    ([[1 << 30, 3], [0, 0], [0, 0]], f"token 0 goes to expert {1 << 30} of [{1 << 30}, 3]: not in [0, 4), or twice"),
]


@pytest.fixture
def ended():
    """(checker that has judged nothing, a clean run)."""
    with watched_kernel(None) as kernel:
        explorer = Explorer(Search(spec=WorldSpec(config=CONFIG)), kernel)
        yield explorer.checker, explorer.world.run(lambda: RandomStrategy(0))


@pytest.mark.parametrize(("experts", "why"), EXPERTS)
def test_experts_that_there_are_not(ended, experts, why):
    checker, run = ended
    run.calls[1][0].routing.topk_idx[:] = experts
    assert [tuple(report)[:2] for report in checker.check(run)] == [("wrong result", f"rank 1, call 1: {why}")]
    assert checker.check(run), "spoilt calls are not what later ones are compared with"


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("what", ["y", "results", "factors"])
def test_numbers_that_are_none(ended, what, value):
    checker, run = ended
    call = run.calls[0][0]
    array = {"y": call.y, "results": call.results, "factors": call.routing.topk_weights}[what]
    array[:] = value
    assert "wrong result" in {report.kind for report in checker.check(run)}


def test_a_task_of_no_kind(ended):
    checker, run = ended
    run.calls[0][0].tasks[Task(7, 0, m=1)] += 1
    (report,) = checker.check(run)
    assert tuple(report)[:2] == ("count", "rank 0, call 1: kind 7(0, 0, 0, 1, 0) ran 1 times, wanted 0")


def test_nothing_ended(ended):
    checker, run = ended
    run.calls[1].clear()
    assert checker.check(run) == []


def test_a_result_flag_with_other_rows(ended):
    checker, run = ended
    call = run.calls[0][0]
    expert, tile = np.argwhere(call.flags >> EPOCH_SHIFT == 1)[0].tolist()
    call.flags[expert, tile] += 1
    (report,) = checker.check(run)
    assert f"{report}".startswith(f"wrong result: rank 0, call 1: the result flag of expert {expert}, chunk {tile} is ")
    call.flags[expert, tile] = 0
    (report,) = checker.check(run)
    assert f"chunk {tile} is -1, wanted " in f"{report}"


def test_flags_differ_from_another_seed_s(ended):
    checker, run = ended
    assert checker.check(run) == []
    run.calls[1][0] = replace(run.calls[1][0], flags=run.calls[1][0].flags + 1)
    (report,) = checker.check(run)
    assert tuple(report)[:2] == ("wrong result", "rank 1, call 1: other result flags than under another seed")


def test_a_tie_that_goes_to_the_higher_expert():
    with watched_kernel(None) as kernel:
        explorer = Explorer(Search(spec=WorldSpec(config=CONFIG, ties=True)), kernel)
        run = explorer.world.run(lambda: RandomStrategy(0))
        assert explorer.checker.check(run) == []
        first = run.calls[0][0].routing.topk_idx[0]
        assert first.tolist() in ([0, 1], [2, 3]), "both of a pair have the highest logits"
        first[:] = first[::-1].copy()
        reports = Explorer(Search(spec=WorldSpec(config=CONFIG, ties=True)), kernel).checker.check(run)
    told = (
        f"rank 0, call 1: token 0 goes to expert {first[0]} of {first.tolist()}, where a lower one has the same logits"
    )
    assert ("wrong result", told) in [tuple(report)[:2] for report in reports]
