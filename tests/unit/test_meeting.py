"""What ranks tell each other while a layer is set up and taken down; with threads as ranks."""

import platform
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from cases import tiny_config
from children import printed
from fake_comm import Comm

from flashmoe_numba.processes.machine import machine_name
from flashmoe_numba.processes.meeting import Meeting


def errors_of(steps, begin=lambda rank: None):
    """What `step(meeting)` raises on each rank, or None; all steps at once, each behind `begin` in its thread."""
    arrived = {}

    def one(rank):
        begin(rank)
        try:
            steps[rank](Meeting(Comm(rank, len(steps), arrived), 30.0))
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(len(steps)) as pool:
        return list(pool.map(one, range(len(steps))))


def disagreement(*values):
    """What all ranks are told when they bring these values."""
    errors = errors_of([lambda meeting, value=value: meeting.agree(None, same=value) for value in values])
    assert {type(error) for error in errors} == {ValueError} and len(set(map(str, errors))) == 1, errors
    return str(errors[0])


@pytest.mark.parametrize("rank", [1, 2])
def test_fields_that_differ_are_named_with_both_values(rank):
    configs = [tiny_config(num_ranks=3, num_experts=6)] * 3
    configs[rank] = replace(configs[0], tile_n=8, activation="gelu", capacity=3)
    said = disagreement(*map(asdict, configs))
    assert said == (
        "all ranks must be given the same: "
        f"rank 0 has activation='silu', rank {rank} has activation='gelu'; "
        f"rank 0 has capacity=None, rank {rank} has capacity=3; rank 0 has tile_n=4, rank {rank} has tile_n=8"
    )


def test_values_that_only_differ_behind_a_thousand_bytes_differ():
    long = "x" * 5000
    said = disagreement({"name": long + "a", "size": 3}, {"name": long + "b", "size": 3})
    assert said.count(long) == 2 and "size" not in said


def test_a_value_that_one_rank_does_not_bring_differs():
    assert disagreement({"size": 3}, {}).endswith("rank 0 has size=3, rank 1 has size=nothing")


def test_the_same_values_are_no_disagreement():
    same = asdict(tiny_config()) | {"name": "ä" * 3000}
    assert errors_of([lambda meeting: meeting.agree(None, same=dict(same))] * 3) == [None] * 3


def test_errors_of_any_length_are_told_whole():
    problem, long = ValueError("y" * 3000), "y" * 3000
    first, second = errors_of([lambda m: m.agree(problem, same={}), lambda m: m.agree(None, same={"size": 1})])
    assert first is problem and str(second) == f"another rank could not start: rank 0: {long}"


@pytest.mark.parametrize(("elsewhere", "said"), [([], None), ([1], ["2 of 3", "1 of 3", "2 of 3"])])
@pytest.mark.parametrize("argument", ["comm", "process_group"])
def test_ranks_on_several_machines_are_told_so(monkeypatch, elsewhere, said, argument):
    monkeypatch.setattr(Comm, "argument", argument, raising=False)
    here = threading.local()
    monkeypatch.setattr("flashmoe_numba.processes.meeting.machine_name", lambda: f"machine {here.rank in elsewhere}")

    errors = errors_of([Meeting.require_one_machine] * 3, begin=lambda rank: setattr(here, "rank", rank))
    begin = f"{argument} must lie on one machine, but"
    parts = [f"{begin} {many} ranks share this one, {platform.node()}" for many in said or []]
    assert [error and str(error) for error in errors] == (parts or [None] * 3)


def test_each_host_has_a_first_rank(monkeypatch):
    """Its text is for the ranks of that host; an error of any is an error of all."""
    here, found = threading.local(), {}
    monkeypatch.setattr("flashmoe_numba.processes.meeting.machine_name", lambda: f"machine {here.rank % 2}")

    def step(meeting):
        text = meeting.from_first(lambda: f"of rank {here.rank}")
        found[here.rank] = (meeting.hosts.of_rank, meeting.first_here, text)
        meeting.from_first(lambda: "" if here.rank == 0 else {}["nothing"])

    errors = errors_of([step] * 4, begin=lambda rank: setattr(here, "rank", rank))
    assert found == {rank: ((0, 1, 0, 1), rank % 2, f"of rank {rank % 2}") for rank in range(4)}
    assert [type(error) for error in errors] == [RuntimeError, KeyError, RuntimeError, RuntimeError]
    assert "rank 1: 'nothing'" in str(errors[0])


def test_a_machine_has_one_name():
    elsewhere = printed("-c", "from flashmoe_numba.processes.machine import machine_name; print(machine_name())")
    assert elsewhere.strip() == machine_name().strip() and machine_name().startswith(platform.node())


def test_a_text_that_rank_0_cannot_make_is_an_error_of_all():
    problem, made = OSError("no room"), []

    def make():
        made.append(1)
        raise problem

    first, *others = errors_of([lambda meeting: meeting.from_first(make)] * 3)
    assert first is problem and made == [1]
    assert set(map(str, others)) == {"another rank could not start: rank 0: no room"}


def test_a_rank_that_the_others_never_join_is_told_why_that_may_be():
    with pytest.raises(TimeoutError) as caught:
        Meeting(Comm(0, 2, {}), 0.01)
    for part in ("within 0.01 s", "setup_deadline_s", "failed before it made its layer", "python -m mpi4py"):
        assert part in str(caught.value)


def test_a_rank_that_waits_in_close_looks_for_one_that_left():
    """The others never come; without the look it would be told so after an hour, so here they come in the end."""
    looks, polls = [], []
    waiting = SimpleNamespace(Test=lambda: polls.append(1) or len(polls) > 50)

    def look():
        looks.append(1)
        if len(looks) == 3:
            raise KeyError("left")

    meeting = Meeting(Comm(0, 1, {}), 30.0)
    meeting.segments = [np.zeros(1)]
    meeting._comm = SimpleNamespace(Ibarrier=lambda: waiting, Free=lambda: None)
    with pytest.raises(KeyError, match="left"):
        meeting.close(look)
    assert len(looks) == 3
