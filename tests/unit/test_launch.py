"""mpirun starts ranks here, whatever a batch system says, within a limit, and without the caller's folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flashmoe_numba import cli
from flashmoe_numba.processes import launch
from flashmoe_numba.processes.destinations import Destinations
from flashmoe_numba.processes.pools import process_pool

ROOT = Path(__file__).resolve().parents[2]
SHADOWS = ["reference", "sim", "token", "queue", "logging", "json", "signal", "numpy", "random", "threading", "select"]
BATCH_SYSTEMS = {
    "slurm": {"SLURM_JOB_ID": "1", "SLURM_NODELIST": "here", "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "2"},
    "two nodes": {"SLURM_JOB_ID": "1", "SLURM_NODELIST": "a,b", "SLURM_NNODES": "2", "SLURM_TASKS_PER_NODE": "1(x2)"},
    "pbs": {"PBS_JOBID": "1", "PBS_ENVIRONMENT": "1", "PBS_NODEFILE": "/proc/none"},
    "lsf": {"LSB_JOBID": "1", "LSB_MCPU_HOSTS": "a 1 b 1"},
    "sge": {"JOB_ID": "1", "PE_HOSTFILE": "/proc/none"},
    "cobalt": {"COBALT_JOBID": "1", "COBALT_NODEFILE": "/proc/none"},
    "a list of hosts": {"HYDRA_HOST_FILE": "/proc/none", "HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_AUTOFORK": "0"},
}


@pytest.fixture(autouse=True)
def outside_mpirun(monkeypatch):
    for name in launch.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current one, whose modules must not be imported."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('the {name}.py of the current folder')\n")
    monkeypatch.chdir(tmp_path)


@pytest.mark.mpi
@pytest.mark.parametrize("variables", BATCH_SYSTEMS.values(), ids=BATCH_SYSTEMS)
def test_ranks_start_here_whatever_a_batch_system_says(monkeypatch, tmp_path, variables):
    monkeypatch.setattr(launch, "START_PATIENCE_S", 10.0)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ranks = tmp_path / "ranks"
    assert launch.start(3, ["sh", "-c", f"echo $PMI_RANK >> {ranks}"], 1.0) == 0
    assert sorted(ranks.read_text().split()) == ["0", "1", "2"]


def popen_of(letters, then, started):
    """A Popen that is an mpirun whose ranks leave these marks at once, and which does this then."""
    popen = subprocess.Popen

    def start(_, **settings):
        assert settings["env"][launch.MARKS_VARIABLE]
        marks = "".join(rf"\036{letter}" for letter in letters)
        started.append(popen(["sh", "-c", f"printf '{marks}' >&2; {then}"], **settings))
        return started[-1]

    return start


HERE = "see what `flashmoe doctor` says of mpirun, or run all ranks in one process with --threads"
THERE = "see whether true starts programs on a, b, and whether these reach each other on all ports"


@pytest.mark.parametrize("hosts", [None, Destinations(("a", "b"), "true")])
@pytest.mark.parametrize(("letters", "far"), [
    ("", "0 of 4 ranks started, MPI began in 0, and no more for 0.3 s"),
    ("gg", "2 of 4 ranks started, MPI began in 0"),
    ("ggggr", "4 of 4 ranks started, MPI began in 1"),
])  # fmt: skip
def test_ranks_that_do_not_begin_are_ended(monkeypatch, capfd, letters, far, hosts):
    started = []
    monkeypatch.setattr(launch, "START_PATIENCE_S", 0.3)
    monkeypatch.setattr(launch, "find_mpirun", lambda: "/some/mpirun")
    monkeypatch.setattr(launch.subprocess, "Popen", popen_of(letters, "exec sleep 100", started))
    with pytest.raises(TimeoutError) as error:
        launch.start(4, ["/some/mpirun"], 1.0, hosts)
    assert str(error.value).startswith(f"/some/mpirun was ended: {far}")
    assert str(error.value).endswith(HERE if hosts is None else THERE)
    assert [process.poll() for process in started] != [None] and capfd.readouterr().err == ""


def test_what_has_begun_is_waited_for_however_long_it_takes(monkeypatch):
    monkeypatch.setattr(launch, "START_PATIENCE_S", 0.2)
    monkeypatch.setattr(launch, "find_mpirun", lambda: "/some/mpirun")
    monkeypatch.setattr(launch.subprocess, "Popen", popen_of("grgr", "sleep 0.6; exit 7", []))
    assert launch.start(2, [], 1.0) == 7


@pytest.mark.parametrize(("letters", "at_interrupt", "said"), [
    ("gg", "exit", "flashmoe run: interrupted\n"),
    ("gg", r"printf '\036r' >&2", "flashmoe run: interrupted\n"),  # a rank begins that has not heard of it
    ("grgr", "exit", ""),  # ranks say it
])  # fmt: skip
def test_somebody_says_that_a_run_was_interrupted(monkeypatch, capfd, letters, at_interrupt, said):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs tests may ignore it
    monkeypatch.setattr(launch, "find_mpirun", lambda: "/some/mpirun")
    then = f'trap "{at_interrupt}" INT; sleep 0.5; kill -INT {os.getpid()}; while sleep 0.05; do :; done'
    monkeypatch.setattr(launch.subprocess, "Popen", popen_of(letters, then, []))
    try:
        assert cli.main(["run", "--preset", "laptop-tiny", "--ranks", "2"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == said


def test_a_rank_tells_once_when_mpi_has_begun(monkeypatch, capfd):
    launch.tell_begun()  # nobody asked
    monkeypatch.setenv(launch.MARKS_VARIABLE, "1")
    launch.tell_begun()
    launch.tell_begun()
    assert capfd.readouterr().err == "\x1er"


def test_the_python_of_ranks_imports_nothing_from_the_current_folder(folder, monkeypatch):
    commands = []
    monkeypatch.setattr(launch, "start", lambda num_ranks, command, deadline_s: commands.append(command) or 0)
    assert cli.main(["run", "--preset", "laptop-tiny", "--ranks", "2"]) == 0
    by_hand = [sys.executable, "-m", "flashmoe_numba"]
    for command in (by_hand, commands[0][: commands[0].index("run")]):
        environment = os.environ | launch.path_of_package()
        plan = [*command, "plan", "--preset", "laptop-tiny", "--json", "-"]
        done = subprocess.run(plan, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        Path("flashmoe_numba.py").write_text("raise ImportError('the first -m that comes')")  # by hand past mending


def test_workers_import_nothing_from_the_current_folder(folder, monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with process_pool(1) as pool:
        assert pool.submit(os.getpid).result() != os.getpid()
    assert "PYTHONSAFEPATH" not in os.environ


def test_an_uninstalled_package_is_found_by_ranks(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(sys, "path", ["", "/elsewhere", str(ROOT)])
    assert launch.path_of_package() == {}
    monkeypatch.setattr(sys, "path", [str(ROOT), "/elsewhere"])
    assert launch.path_of_package() == {"PYTHONPATH": f"/elsewhere{os.pathsep}{ROOT}"}
