"""Where the environment and MPI do not fit, one sentence names the variable and what to do."""

import os
import socket
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from children import run_python

from flashmoe_numba import cli
from flashmoe_numba.layer import arguments
from flashmoe_numba.processes import mpi_environment
from flashmoe_numba.processes.mpi_environment import (
    begin_mpi,
    lonely_variable,
    say_strange,
    strange_variable,
    why_alone,
)
from flashmoe_numba.processes.netmod import PREFERRED, SURVIVING
from reference import MoEConfig, Weights

pytestmark = pytest.mark.usefixtures("outside_mpirun")


@pytest.mark.parametrize(("variables", "vendor", "strange"), [
    ({}, "MPICH", None),
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPICH", None),
    ({"OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}, "MPICH", "OMPI_COMM_WORLD_RANK"),
    ({"OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}, "Open MPI", None),
    ({"PMIX_RANK": "0"}, "MPICH", "PMIX_RANK"),
    ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "1"}, "MPICH", None),
    ({"PMI_FD": "987"}, "MPICH", "PMI_FD"),  # not open
    ({"PMI_FD": "nonsense"}, "MPICH", "PMI_FD"),
    ({"PMI_FD": "99999999999999999999"}, "MPICH", "PMI_FD"),
])  # fmt: skip
def test_what_mpi_would_abort_on(monkeypatch, variables, vendor, strange):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert strange_variable(vendor) == strange


def test_a_connection_is_a_socket(monkeypatch, tmp_path):
    left, right = socket.socketpair()
    with left, right, open(tmp_path / "file", "w") as file:
        for number, strange in ((left.fileno(), None), (file.fileno(), "PMI_FD")):
            monkeypatch.setenv("PMI_FD", str(number))
            assert strange_variable("MPICH") == strange


def test_one_rank_where_several_are_promised(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "1")
    assert lonely_variable(1) is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    assert (lonely_variable(3), lonely_variable(1)) == (None, "OMPI_COMM_WORLD_SIZE")


def test_the_sentence_names_variable_mpirun_and_cure(monkeypatch):
    monkeypatch.setattr(mpi_environment, "mpirun_beside", lambda: "/venv/bin/mpirun")
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("PMI_RANK", "0")
    assert say_strange("PMI_SIZE", "MPICH") == (
        "PMI_SIZE=4 in the environment is not of an mpirun of MPICH, which mpi4py uses: "
        "start ranks by /venv/bin/mpirun, or unset PMI_RANK PMI_SIZE if left over"
    )
    mpi = SimpleNamespace(get_vendor=lambda: ("MPICH", (5, 0)))
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    assert why_alone(4) == f": {say_strange('PMI_SIZE', 'MPICH')}"
    monkeypatch.delenv("PMI_SIZE")
    assert why_alone(4) == ": start 4 ranks by /venv/bin/mpirun -n 4"


def test_a_layer_on_a_lonely_rank_says_so(monkeypatch):
    monkeypatch.setattr(mpi_environment, "mpirun_beside", lambda: "/venv/bin/mpirun")
    config = MoEConfig(num_ranks=4, num_tokens=3, hidden=4, ffn=4, num_experts=4, num_topk=1)
    comm = SimpleNamespace(size=1, rank=0)
    settings = arguments.LayerSettings(config=config, weights=Weights.random(config), comm=comm, backend="cpu")
    message = "comm must have config.num_ranks=4 ranks, got 1: start 4 ranks by /venv/bin/mpirun -n 4"
    with pytest.raises(ValueError, match=f"^{message}$"):
        settings.check()


@pytest.mark.parametrize("command", [["run", "--threads", "--preset", "laptop-tiny"], ["calibrate", "--out", "x.toml"]])
def test_a_left_over_rank_is_named(monkeypatch, capsys, command):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setattr("flashmoe_numba.processes.launch.guard_this_rank", lambda deadline_s: None)
    lonely = SimpleNamespace(num_ranks=1, rank_idx=0)
    monkeypatch.setattr("flashmoe_numba.processes.together.MpiRanks", lambda deadline_s: lonely)
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("; PMI_RANK in the environment makes this a rank: unset it if left over\n")


@pytest.mark.mpi
def test_a_left_over_connection_is_one_sentence():
    command = ["-m", "flashmoe_numba", "run", "--preset", "laptop-tiny", "--ranks", "2"]
    done = run_python(*command, PMI_RANK="0", PMI_SIZE="2", PMI_FD="1")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("flashmoe run: error: PMI_FD=1 in the environment is not of an mpirun of ")
    assert done.stderr.endswith("or unset PMI_RANK PMI_SIZE PMI_FD if left over\n")


@pytest.fixture
def mpi(monkeypatch):
    """An MPICH that has not begun, of two ranks on one machine."""
    for name in PREFERRED:  # what beginning sets is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    begun = []
    world = SimpleNamespace(size=2, allgather=lambda name: [name] * 2)
    world.Split_type = lambda kind: SimpleNamespace(size=2, Free=lambda: None)
    fake = SimpleNamespace(
        COMM_WORLD=world, COMM_TYPE_SHARED=1, THREAD_MULTIPLE=3, Init_thread=begun.append, begun=begun,
        Is_initialized=lambda: bool(begun), get_vendor=lambda: ("MPICH", (5, 0)), Query_thread=lambda: 3,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=fake, rc=SimpleNamespace()))
    return fake


def test_mpi_begins_once(mpi):
    assert begin_mpi() is begin_mpi() is mpi
    assert mpi.begun == [mpi.THREAD_MULTIPLE]
    assert (sys.modules["mpi4py"].rc.initialize, sys.modules["mpi4py"].rc.finalize) == (False, True)


def test_mpi_does_not_begin_under_anothers_mpirun(mpi, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    with pytest.raises(mpi_environment.UsageError, match="OMPI_COMM_WORLD_RANK=0 in the environment is not of an"):
        begin_mpi()
    assert mpi.begun == []


def test_ranks_that_are_each_alone_are_told(mpi, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    mpi.COMM_WORLD.size = 1
    with pytest.raises(mpi_environment.UsageError, match="PMI_SIZE=2 in the environment is not of an"):
        begin_mpi()


def test_before_mpi_begins_what_outlives_a_lost_rank_is_chosen_unless_the_user_has(mpi, monkeypatch):
    monkeypatch.setenv("FI_PROVIDER", "verbs")
    begin_mpi()
    assert {name: os.environ[name] for name in SURVIVING} == {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "verbs"}
    assert os.environ["FI_TCP_MAX_SAVED"] == PREFERRED["FI_TCP_MAX_SAVED"]


@pytest.mark.parametrize(
    ("variables", "cure"), [({}, "do"), ({"MPIR_CVAR_NOLOCAL": "1"}, "do: unset MPIR_CVAR_NOLOCAL")]
)
def test_ranks_that_share_no_memory_are_told(mpi, monkeypatch, variables, cure):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    mpi.COMM_WORLD.Split_type = lambda kind: SimpleNamespace(size=1, Free=lambda: None)
    with pytest.raises(mpi_environment.UsageError) as error:
        begin_mpi()
    assert str(error.value) == f"all ranks of a machine must share its memory, but only 1 of 2 {cure}"


@pytest.mark.parametrize(("given", "error"), [(3, None), (2, "ranks on several hosts need an MPI that threads may")])
def test_ranks_on_several_machines_need_threads(mpi, given, error):
    world = mpi.COMM_WORLD
    world.allgather = lambda name: [name, "another"]
    world.Split_type = lambda kind: SimpleNamespace(size=1, Free=lambda: None)
    mpi.Query_thread = lambda: given
    with nullcontext() if error is None else pytest.raises(mpi_environment.UsageError, match=error):
        begin_mpi()
