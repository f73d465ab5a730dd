"""`flashmoe run` under mpirun: right results, and every way in which a run can end before its time.

Whatever happens, the command returns, no process of it is left, and nothing is left in /dev/shm.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashmoe_numba.processes import launch
from flashmoe_numba.processes.launch import find_mpirun

pytestmark = pytest.mark.mpi

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE))
from losing import VICTIM, last_words  # noqa: E402

DEADLINE_S = 3
GRACE_S = 10  # beyond the deadline: last words, guards, a busy machine
MARK = "FLASHMOE_TEST_FOLDER"  # in the environment of all that a test has started, whoever its parent is by now
TINY = ["run", "--preset", "laptop-tiny"]
ENDLESS = [*TINY, "--iterations", "1000000", "--deadline-s", str(DEADLINE_S)]
FLASHMOE = [sys.executable, "-m", "flashmoe_numba"]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """The kernel is in the disk cache, so that a rank is in its calls soon after its start."""
    subprocess.run([*FLASHMOE, *TINY, "--threads", "--iterations", "1"], cwd=ROOT, check=True, capture_output=True)


def environment():
    """That of a user's shell, not of a rank."""
    return {name: value for name, value in os.environ.items() if name not in launch.RANK_VARIABLES} | {
        "PYTHONPATH": str(ROOT),
        "HWLOC_XMLFILE": "",
    }


def run(command, timeout_s=60):
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout_s)


def shared_memory(pid):
    """What a process maps of /dev/shm: by name, with " (deleted)" for what has no name any more."""
    with contextlib.suppress(OSError):
        return set(re.findall(r"/dev/shm/.*", Path(f"/proc/{pid}/maps").read_text()))
    return set()


def processes():
    """pid -> (parent, arguments, state) of all that are alive."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
            if state != "Z":
                found[int(folder.name)] = (int(parent), [part.decode() for part in arguments], state)
    return found


class Running:
    """A started command with all processes that come of it."""

    def __init__(self, command, folder):
        self.mark, self.mapped, self.stderr = f"{MARK}={folder}", set(), folder / "stderr"
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment() | {launch.TERMINAL_VARIABLE: "1", MARK: str(folder)},
                stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
            )  # fmt: skip

    def family(self):
        """pid -> (parent, arguments, state) of its processes that are alive."""
        found = {}
        for pid, known in processes().items():
            with contextlib.suppress(OSError):
                if self.mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found[pid] = known
        return found

    def wait_for(self, condition):
        """Until it holds, while the command runs; then remember what shared memory there is."""
        limit = time.monotonic() + 60
        while not condition():
            assert self.process.poll() is None, self.stderr.read_text()
            assert time.monotonic() < limit, self.stderr.read_text()
            time.sleep(0.05)
        self.mapped = {name for pid in self.family() for name in shared_memory(pid)}
        assert self.mapped, "the ranks share memory"

    def ranks(self):
        """pids of the ranks, once the progress of the measured calls is drawn."""
        self.wait_for(lambda: "layer and BLAS" in self.stderr.read_text())
        family = self.family()
        return sorted(
            pid for pid, (guard, _, _) in family.items() if guard in family and family[guard][1][0] == "/bin/sh"
        )

    def stopped(self):
        """pid of the rank that stands still, once one does."""
        self.wait_for(lambda: "T" in [state for _, _, state in self.family().values()])
        return next(pid for pid, (_, _, state) in self.family().items() if state == "T")

    def left(self):
        return list(self.family().values()) + [name for name in self.mapped if Path(name).exists()]

    def end(self, timeout_s):
        """(exit status, stderr), when it is over and left nothing."""
        self.process.wait(timeout_s)
        limit = time.monotonic() + GRACE_S
        while self.left() and time.monotonic() < limit:
            time.sleep(0.05)
        assert self.left() == []
        return self.process.returncode, self.stderr.read_text().replace("\x1b[K", "")


@pytest.fixture
def start(tmp_path):
    started = []

    def begin(command):
        started.append(Running(command, tmp_path))
        return started[-1]

    yield begin
    for running in started:
        for pid in running.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        running.process.wait()


def assert_all_say(err, expected):
    """Each of these ranks has said what is expected of it (a regular expression), and no other has said anything."""
    said = [line.removeprefix("flashmoe: error: ") for line in err.splitlines() if "flashmoe: error: " in line]
    for rank, pattern in expected.items():
        assert any(re.fullmatch(pattern, line) for line in said), f"rank {rank} did not say {pattern!r}:\n{err}"
    assert len(said) == len(expected), err


@pytest.mark.parametrize("ranks", [2, 4])
def test_passes_and_starts_mpirun_by_itself(ranks):
    done = run([*FLASHMOE, *TINY, "--ranks", str(ranks), "--json", "-", "--capacity", "5"])
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["passed"], report["transport"], report["ranks"]) == (True, "mpi", ranks)
    assert report["sent_rows"] + report["dropped_pairs"] == ranks * 12 * 2


def test_processes_and_threads_give_the_same_numbers(tmp_path):
    reports = []
    for where in ("--mpi", "--threads"):
        flags = ["--ranks", "2", "--iterations", "2", where, "--json", str(tmp_path / "new" / where)]
        done = run([*FLASHMOE, *TINY, *flags])
        assert done.returncode == 0, done.stderr
        assert "passed" in done.stdout
        reports.append(json.loads((tmp_path / "new" / where).read_text()))
    for key in ("max_rel_error", "sent_rows", "padded_row_share", "config"):
        assert reports[0][key] == reports[1][key]


def test_backwards_of_processes_and_threads_have_the_same_gradients(tmp_path):
    shares = []
    for where in ("--threads", "--mpi"):  # the first compiles
        files = {flag: tmp_path / where / flag for flag in ("json", "trace")}
        flags = [str(part) for flag, file in files.items() for part in (f"--{flag}", file)]
        done = run([*FLASHMOE, *TINY, "--ranks", "2", "--iterations", "2", "--backward", where, *flags], timeout_s=500)
        assert done.returncode == 0, done.stderr
        report, trace = (json.loads(file.read_text()) for file in files.values())
        assert report["passed"] and report["bitwise_repeatable"] and report["backward"]["backward_ms"]["min"] > 0
        shares.append(report["backward"]["error_shares"])
        weights = {event["pid"] for event in trace["traceEvents"] if event["name"] == "WEIGHTS"}
        assert weights == {0, 1}
    assert shares[0] == shares[1] and all(shares[0].values())


def test_the_trace_has_all_ranks_on_one_clock(tmp_path):
    done = run([*FLASHMOE, *TINY, "--ranks", "4", "--iterations", "1", "--trace", str(tmp_path / "trace.json")])
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} == {0, 1, 2, 3}
    starts, ends = ({e["id"]: e["ts"] for e in events if e["ph"] == phase} for phase in "sf")
    assert len(starts) > 4
    assert all(starts[number] < ends[number] for number in starts)


def test_inside_a_users_mpirun_its_ranks_are_used():
    done = run([find_mpirun(), "-n", "2", *FLASHMOE, *TINY, "--json", "-"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranks"] == 2


@pytest.mark.parametrize(("flags", "message"), [
    (["--ranks", "4"], "argument --ranks: must be the number of ranks of this mpirun, 2, got 4"),
    (["--experts", "9"], "--experts must be a multiple of --ranks=2, got 9"),
    (["--topk", "0"], "argument --topk: must be an integer >= 1, got '0'"),
    (["--threads"], "--threads and fibers run all ranks in one process: start this without mpirun"),
])  # fmt: skip
def test_inside_mpirun_errors_are_said_once(flags, message):
    done = run([find_mpirun(), "-n", "2", *FLASHMOE, *TINY, *flags])
    assert (done.returncode, done.stderr, done.stdout) == (2, f"flashmoe run: error: {message}\n", "")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("moment", ["before its blocks", "after its dispatch", "before a meeting"])
def test_when_a_rank_is_lost_all_others_say_where_they_waited_for_it(start, moment, signum, tmp_path):
    sizes = ["--ranks", "4", "--experts", "8"]  # few, so that every rank sends rows to every other
    running = start([sys.executable, str(HERE / "losing.py"), moment, str(tmp_path), *ENDLESS, *sizes])
    os.kill(running.stopped(), signum)
    lost = time.monotonic()
    code, err = running.end(timeout_s=60)
    assert time.monotonic() - lost < DEADLINE_S + GRACE_S
    assert code == 1, err
    assert (f"flashmoe: rank {VICTIM} was killed, status 137" in err) == (signum == signal.SIGKILL), err
    assert_all_say(err, {rank: last_words(moment, rank, DEADLINE_S) for rank in (0, 2, 3)})


SIGNALS = [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)]


@pytest.mark.parametrize(("signum", "to_group"), SIGNALS)
def test_an_interrupted_run_ends_cleanly(start, signum, to_group):
    running = start([*FLASHMOE, *ENDLESS, "--ranks", "4"])
    running.ranks()
    (os.killpg if to_group else os.kill)(running.process.pid, signum)
    code, err = running.end(timeout_s=20)
    assert code == 128 + signum
    assert "Traceback" not in err
    assert err.count("flashmoe: interrupted") == 1
    assert not re.search(r"mpiexec|proxy|Abort", err)


@pytest.mark.parametrize("victim", ["command", "mpirun", "guard"])
def test_nobody_outlives_the_others(start, victim):
    running = start([*FLASHMOE, *ENDLESS, "--ranks", "2"])
    rank = running.ranks()[0]
    guard = processes()[rank][0]
    mpirun = next(pid for pid, (_, arguments, _) in running.family().items() if "mpirun" in arguments[0])
    os.kill({"command": running.process.pid, "mpirun": mpirun, "guard": guard}[victim], signal.SIGKILL)
    code, _ = running.end(timeout_s=20)
    assert code != 0


RAISING = """
import sys, time
from flashmoe_numba.cli import main
from flashmoe_numba.layer.calls import Calls

honest = Calls.run

def fail(self, *arguments):
    if self._life.epoch == 3 and self._parts.heap.rank_indices[0] == 1:
        time.sleep(1)  # the others are in the kernel by now
        raise ZeroDivisionError("planted")
    return honest(self, *arguments)

Calls.run = fail
sys.exit(main(sys.argv[1:]))
"""


def test_when_a_rank_raises_the_others_stop_at_once_and_name_it(start, tmp_path):
    (tmp_path / "raising.py").write_text(RAISING)
    command = [find_mpirun(), "-n", "3", sys.executable, str(tmp_path / "raising.py"), *TINY, "--experts", "9"]
    began = time.monotonic()
    code, err = start([*command, "--deadline-s", "100"]).end(timeout_s=60)
    assert time.monotonic() - began < 50
    assert code == 1
    assert "flashmoe: rank 1 failed:" in err
    assert "ZeroDivisionError: planted" in err
    cause = "stopped: rank 1 left in epoch 3 because of an error of its own"
    assert_all_say(err, {rank: f"rank {rank} {cause}" for rank in (0, 2)})
