"""Work spread over the ranks of an mpirun: the same findings, and every way to end early is short and says so."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashmoe_numba.cli import main
from flashmoe_numba.processes import launch

pytestmark = pytest.mark.mpi

ROOT = Path(__file__).resolve().parents[2]
FLASHMOE = [sys.executable, "-m", "flashmoe_numba"]
ENDLESS = ["explore", "--seeds", "100000"]
GRID = """schema = 1
[grid]
policy = ["flashmoe"]
hardware = ["2xH100"]
preset = ["laptop-tiny"]
tokens = [%s]
"""
PATIENCE_S = 40  # the guard of a killed rank waits 5 s


def environment(**changes):
    """That of a user's shell, not of a rank."""
    kept = {name: value for name, value in os.environ.items() if name not in launch.RANK_VARIABLES}
    return kept | {"PYTHONPATH": str(ROOT), "HWLOC_XMLFILE": ""} | changes


def mpirun(*command):
    return [launch.find_mpirun(), "-n", "3", *FLASHMOE, *command]


class Started:
    """A command, and all processes that come of it."""

    def __init__(self, command, folder):
        self.mark = f"FLASHMOE_TEST_FOLDER={folder}".encode()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(FLASHMOE_TEST_FOLDER=str(folder)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def family(self):
        """pid -> (environment, arguments) of its processes that are alive."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                if self.mark in variables:
                    found[int(folder.name)] = variables, (folder / "cmdline").read_bytes().split(b"\0")
        return found

    def rank(self, number):
        """pid of the Python process of a rank."""
        (pid,) = (
            pid
            for pid, (variables, arguments) in self.family().items()
            if f"PMI_RANK={number}".encode() in variables and b"python" in arguments[0]
        )
        return pid

    def end(self):
        """(exit status, output, errors), when nothing is left of it."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        limit = time.monotonic() + PATIENCE_S
        while self.family() and time.monotonic() < limit:
            time.sleep(0.05)
        assert self.family() == {}
        return self.process.returncode, out, err


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(command):
        started.append(Started(command, tmp_path))
        return started[-1]

    yield begin
    for one in started:
        for pid in one.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        one.process.wait()


def test_the_same_is_found_as_in_one_process(tmp_path):
    flags = ["explore", "--world", "plain", "--plant", "one-flag-for-all-calls", "--strategy", "pct"]
    flags += ["--processors", "1", "--epochs", "3", "--topk", "1", "--tokens", "2", "--seeds", "40"]
    assert main([*flags, "--jobs", "1", "--json", str(tmp_path / "one")]) == 1
    command = mpirun(*flags, "--json", str(tmp_path / "three"))
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    one, three = (json.loads((tmp_path / name).read_text()) for name in ("one", "three"))
    assert (one["jobs"], three["jobs"]) == (1, 2)
    for key in ("bad_seed", "runs", "reports", "search"):
        assert one[key] == three[key]
    assert done.stdout.count("is not clean") == 1


def begun(start, command):
    """A started `flashmoe explore` that has said what it runs."""
    running = start(command)
    assert "strategy random" in running.process.stdout.readline()
    time.sleep(0.3)
    return running


@pytest.mark.parametrize("command", [mpirun(*ENDLESS), [*FLASHMOE, *ENDLESS, "--jobs", "2"]], ids=["mpirun", "pool"])
def test_ctrl_c_says_how_far_an_exploration_came(start, command):
    running = begun(start, command)
    os.killpg(running.process.pid, signal.SIGINT)  # as a terminal does
    status, out, err = running.end()
    assert status == 130, err
    counted, verdict = [line for line in out.splitlines() if "mpiexec" not in line and line]
    runs = int(counted.split()[0])
    assert (counted.split()[1], verdict) == ("runs", "clean so far")
    assert "switches/s" in counted
    state = f"{runs} of 100000 runs are done, and --seed {runs} goes on from there"
    assert err.strip() == f"flashmoe explore: interrupted; {state}"


def test_ctrl_c_ends_a_sweep(start, tmp_path):
    (tmp_path / "grid.toml").write_text(GRID % ", ".join(map(str, range(100, 3000))))
    file = tmp_path / "rows.jsonl"
    running = start(mpirun("sweep", str(tmp_path / "grid.toml"), "--out", str(file)))
    limit = time.monotonic() + 60
    while not file.exists() or not file.read_bytes():
        assert time.monotonic() < limit, "the sweep writes nothing"
        time.sleep(0.05)
    os.killpg(running.process.pid, signal.SIGINT)
    status, _, err = running.end()
    assert status == 130, err
    assert err.startswith("flashmoe sweep: interrupted; ")


def test_a_rank_that_is_killed_is_named(start):
    running = begun(start, mpirun(*ENDLESS))
    os.kill(running.rank(2), signal.SIGKILL)
    status, _, err = running.end()
    assert status not in (0, 130)
    assert "flashmoe: rank 2 was killed, status 137" in err
