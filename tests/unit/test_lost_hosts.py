"""What experiments/hosts says of a trial: right and named ranks are counted, and nothing wrong is overlooked."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "experiments"))
from hosts import faults, trial
from hosts.calls import DIGEST_BYTES, digest, make_config, tokens_of
from hosts.faults import FAULTS, Harm, World
from hosts.trial import Size, Verdict

SIZE, BEGUN = Size(deadline_s=2.0, slack_s=3.0), 100.0
WAITED = (
    "FlashMoEError: rank {rank}, block 1 (OS block) gave up in epoch 7: waited for the result flag of rank {peer}, its "
    "expert 0, row tile 0; it holds epoch 6; 2 flags missing, and no rank finished a task for about 2 s"
)
CUT = Harm(set(), {0: {2, 3}, 1: {2, 3}, 2: {0, 1}, 3: {0, 1}}, BEGUN)
LOST = Harm({3}, {0: {3}, 1: {3}, 2: {3}}, BEGUN)


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """A verdict on ranks that have made two calls, and on these errors: {rank: (seconds after the fault, text)}."""
    results = [[bytes([call, rank]) * (DIGEST_BYTES // 2) for rank in range(4)] for call in range(2)]
    monkeypatch.setattr(trial, "expected", lambda *size: iter(results + results))

    def of(harm, errors, changed=None):
        for rank in range(4):
            saved = b"".join(call[rank] for call in results)
            (tmp_path / f"{rank}.digests").write_bytes(saved if rank != changed else saved[:-1] + b"?")
        for rank, (seconds, text) in errors.items():
            (tmp_path / f"{rank}.error").write_text(f"{BEGUN + seconds} {text}")
        verdict = Verdict()
        trial._judge(harm, SIZE, tmp_path, verdict)
        return verdict

    return of


def names(peers, seconds=2.5):
    return {rank: (seconds, WAITED.format(rank=rank, peer=peer)) for rank, peer in peers.items()}


def test_all_right(judge):
    verdict = judge(Harm(set(), {}, BEGUN), {})
    assert (verdict.right, verdict.named, verdict.calls, verdict.problems) == (4, 0, 2, [])


def test_who_was_lost_is_named(judge):
    verdict = judge(LOST, names({0: 3, 1: 3, 2: 3}))
    assert (verdict.right, verdict.named, verdict.other, verdict.problems) == (0, 3, [], [])
    assert verdict.over_ms == pytest.approx([500.0] * 3)


def test_each_side_of_a_cut_names_the_other(judge):
    verdict = judge(CUT, names({0: 2, 1: 3, 2: 0, 3: 2}))
    assert (verdict.named, verdict.problems) == (3, [])
    assert verdict.other == [f"rank 3: {WAITED.format(rank=3, peer=2)}"]  # its neighbour waited itself


@pytest.mark.parametrize(("harm", "errors", "changed", "problem"), [
    (Harm(set(), {}, BEGUN), {}, 1, "rank 1: wrong result of call 1"),
    (LOST, names({0: 3, 1: 3}), None, "rank 2 said nothing"),
    (LOST, names({0: 3, 1: 3}) | {2: (1.0, "TimeoutError: something")}, None, "rank 2: not a named error"),
    (LOST, names({0: 3, 1: 3}) | names({2: 3}, 5.1), None, "rank 2: 3.10 s beyond the deadline"),
    (Harm(set(), {}, BEGUN), names({2: 3}), None, "rank 2 should have gone on"),
])  # fmt: skip
def test_what_is_wrong_is_told(judge, harm, errors, changed, problem):
    found = judge(harm, errors, changed).problems
    assert len(found) == 1 and found[0].startswith(problem)


def test_mpirun_may_end_ranks_where_a_host_dies_with_its_part(judge):
    verdict = judge(Harm({2, 3}, {0: {2, 3}, 1: {2, 3}}, BEGUN, at_once=True), names({0: 2}))
    assert (verdict.named, verdict.ended, verdict.problems) == (1, 1, [])


@pytest.mark.parametrize("name", FAULTS)
def test_faults_say_whom_they_have_met(name, monkeypatch):
    met, clock = [], SimpleNamespace(monotonic=lambda: BEGUN, sleep=lambda seconds: met.append(seconds))
    monkeypatch.setattr(os, "kill", lambda pid, signum: met.append(pid))
    monkeypatch.setattr(faults, "time", clock)
    hosts = SimpleNamespace(**{
        what: lambda host, what=what: met.append((what, host))
        for what in ("power_off", "kill", "cut", "mend", "stop", "go_on", "limit")
    })  # fmt: skip
    world = World(hosts, [1000 + rank for rank in range(6)], ranks_per_host=2, deadline_s=2.0)
    seen = set()
    for seed in range(20):
        met.clear()
        harm = FAULTS[name](world, np.random.default_rng(seed))
        assert met and harm.begun == BEGUN and not harm.lost & set(harm.apart)
        assert harm.lost | set(harm.apart) in (set(), set(range(6)))
        assert all(names and rank not in names for rank, names in harm.apart.items())
        killed = {pid - 1000 for pid in met if isinstance(pid, int) and pid >= 1000}
        assert killed in (set(), harm.lost)
        told = {host for what in met if isinstance(what, tuple) for host in what[1:]} if name != "slow" else set()
        assert told <= {1, 2, 3}  # mpirun's host is left alone
        seen |= {frozenset(harm.lost), frozenset(told)}
    assert len(seen - {frozenset()}) >= 3 or name == "slow"


def test_tokens_are_the_same_for_all_who_make_them_and_change_from_call_to_call():
    config = make_config(4, 24)
    counts = [[len(x) for x in tokens_of(config, call)] for call in range(50)]
    assert len({tuple(each) for each in counts}) > 45 and {0, 24} <= {count for each in counts for count in each}
    again = tokens_of(config, 7)
    assert [digest(x) for x in again] == [digest(x) for x in tokens_of(config, 7)]
