"""Work spread over processes: what `flashmoe explore` says when they are too few, die, or are not to be had."""

import importlib.util
import json
import os
import signal
from concurrent.futures import Executor

import pytest

from flashmoe_numba import cli
from flashmoe_numba.commands.spread import num_processes, open_pool, progress
from flashmoe_numba.processes import launch
from flashmoe_numba.processes.pools import Pool, process_pool

pytestmark = pytest.mark.usefixtures("outside_mpirun")


def die(search, seeds, pool):
    yield pool.submit(os._exit, 1).result()


def test_a_worker_that_dies_ends_an_exploration_with_a_word(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("flashmoe_numba.commands.explore.explore", die)
    flags = ["--seeds", "50", "--seed", "7", "--jobs", "2", "--json", str(tmp_path / "json")]
    assert cli.main(["explore", *flags]) == 1
    out, err = capsys.readouterr()
    state = "0 of 50 runs are done, and --seed 7 goes on from there"
    reason = "a process died, maybe for lack of memory: try fewer --jobs"
    assert err == f"flashmoe explore: {reason}; {state}\n"
    assert out.splitlines()[-1] == "clean so far"
    told = json.loads((tmp_path / "json").read_text())
    assert (told["stopped"], told["jobs"], told["runs"]) == (reason, 2, 0)


def test_jobs_under_mpirun_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("PMI_RANK", "0")
    assert cli.main(["explore", "--jobs", "2", "--seeds", "50"]) == 2
    assert capsys.readouterr().err == (
        "flashmoe explore: error: argument --jobs: under mpirun its ranks are the processes\n"
    )


def test_under_mpirun_without_mpi4py_the_error_names_the_cure(monkeypatch, capsys):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["explore"]) == 2
    assert capsys.readouterr().err == (
        "flashmoe explore: error: under mpirun this needs mpi4py, not found here: pip install 'flashmoe-numba[mpi]'\n"
    )


def test_one_process_is_this_one():
    with open_pool(1) as pool:
        assert (pool, num_processes(pool)) == (None, 1)
    with process_pool(3) as pool:
        assert num_processes(pool) == 3
        assert list(pool.map(abs, [-1, 2])) == [1, 2]


def test_the_bar_has_a_rate(monkeypatch, capsys):
    monkeypatch.setenv(launch.TERMINAL_VARIABLE, "1")
    assert list(progress(range(3), 3, "runs")) == [0, 1, 2]
    assert " runs/s" in capsys.readouterr().err


def test_ctrl_c_comes_when_the_work_has_been_handed_in():
    handed_in = []

    class Interrupted(Executor):
        def submit(self, fn, *args):
            os.kill(os.getpid(), signal.SIGINT)
            handed_in.append(fn(*args))

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Pool(Interrupted(), 1).submit(abs, -1)
    assert handed_in == [1]
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
