"""What experiments/hosts says of a trial: right and named ranks are counted, and nothing wrong is overlooked."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "experiments"))
from hosts import faults, stacks, trial
from hosts.calls import DIGEST_BYTES, Work, digest
from hosts.faults import FAULTS, Harm, World
from hosts.started import Started
from hosts.trial import Size, Verdict
from lost_common import lost_parser

SIZE, BEGUN = Size(deadline_s=2.0, slack_s=3.0), 100.0
WAITED = (
    "FlashMoEError: rank {rank}, block 1 (OS block) gave up in epoch 7: waited for the result flag of rank {peer}, its "
    "expert 0, row tile 0; it holds epoch 6; 2 flags missing, and no rank finished a task for about 2 s"
)
CUT = Harm(set(), {0: {2, 3}, 1: {2, 3}, 2: {0, 1}, 3: {0, 1}}, BEGUN)
LOST = Harm({3}, {0: {3}, 1: {3}, 2: {3}}, BEGUN)


class Ended(Started):
    """Four ranks that have left files in a folder, and on whose hosts there may be something."""

    def __init__(self, folder, status=0, processes=(), shared_memory=()):
        self.folder, self.num_ranks, self.process = folder, 4, SimpleNamespace(poll=lambda: status)
        self.hosts = SimpleNamespace(
            names=["host-1", "host-2", "host-3"],
            processes=lambda i: [os.getpid()] if i in processes else [],
            shared_memory=lambda i: ["mpich_shm_x"] if i in shared_memory else [],
        )
        (folder / "tmp").mkdir(exist_ok=True)
        (folder / "stderr").touch()


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """A verdict on ranks that have made two calls, and on these errors: {rank: (seconds after the fault, text)}."""
    results = [[bytes([call, rank]) * (DIGEST_BYTES // 2) for rank in range(4)] for call in range(2)]
    monkeypatch.setattr(trial, "expected", lambda work: iter(results + results))

    def of(harm, errors, changed=None, status=0):
        for rank in range(4):
            saved = b"".join(call[rank] for call in results)
            (tmp_path / f"{rank}.digests").write_bytes(saved if rank != changed else saved[:-1] + b"?")
        for rank, (seconds, text) in errors.items():
            (tmp_path / f"{rank}.error").write_text(f"{BEGUN + seconds} {text}")
        verdict = Verdict()
        trial._judge(harm, Ended(tmp_path, status), SIZE, verdict)
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


def test_ranks_that_end_without_an_error_have_not_gone_on(judge):
    problem = "all should have gone on, and mpirun's status is 9"
    assert judge(Harm(set(), {}, BEGUN), {}, status=9).problems == [problem]
    assert judge(LOST, names({0: 3, 1: 3, 2: 3}), status=9).problems == []


@pytest.mark.parametrize(("left", "problem"), [
    ({}, None),
    ({"processes": [0]}, "processes are left: {'host-1': 1}; calls [0, 0, 0, 0], errors {}\nload"),
    ({"processes": [1, 2]}, "processes are left: {'host-2': 1, 'host-3': 1}; "),
    ({"shared_memory": [2]}, "shared memory is left: {'host-3': ['mpich_shm_x']}"),
])  # fmt: skip
def test_what_is_left_behind_is_told(tmp_path, monkeypatch, left, problem):
    monkeypatch.setattr(trial, "GONE_LIMIT_S", 0.1)
    monkeypatch.setattr(stacks, "STACK_PATIENCE_S", 0.0)
    found = trial.left_behind(Ended(tmp_path, **left))
    assert len(found) == (problem is not None) and all(text.startswith(problem) for text in found)


def test_temporary_files_are_told(tmp_path):
    ranks = Ended(tmp_path)
    (tmp_path / "tmp/hwloc").touch()
    assert trial.left_behind(ranks) == ["files are left: ['hwloc']"]


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
    work = Work(num_ranks=4)
    counts = [[len(x) for x in work.tokens(call)[0]] for call in range(50)]
    assert len({tuple(each) for each in counts}) > 45 and {0, 24} <= {count for each in counts for count in each}
    (x, dy), (x_again, dy_again) = work.tokens(7), work.tokens(7)
    assert digest(*x, *dy) == digest(*x_again, *dy_again)
    assert [each.shape for each in x] == [each.shape for each in dy]
    assert digest(*x) != digest(*dy)


def test_a_digest_is_of_all_arrays_and_of_all_that_weights_have():
    x, weights = np.arange(3.0), SimpleNamespace(up=np.arange(4.0), bias=None, down=np.arange(2.0))
    first = digest(x, weights)
    assert first == digest(x, weights) and len(first) == DIGEST_BYTES
    for changed in (x, weights.up, weights.down):
        changed[1] += 1
        assert digest(x, weights) != first
        changed[1] -= 1


@pytest.mark.parametrize("deadline", ["0", "-1", "nan", "inf", "soon"])
def test_a_deadline_that_no_layer_takes_is_refused_before_anything_runs(deadline, capsys):
    """Ranks that could make no layer were waited for."""
    parser = lost_parser("", FAULTS, runs=1, of_what="", deadline_s=2.0)
    assert parser.parse_args(["--deadline-s", "0.5"]).deadline_s == 0.5
    with pytest.raises(SystemExit):
        parser.parse_args(["--deadline-s", deadline])
    assert f"must be a number in (0, 86400], got '{deadline}'" in capsys.readouterr().err
