"""The same under mpirun, as users run it: `flashmoe run`, of which one rank is killed or stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flashmoe_numba.processes import launch

from .verdict import Verdict, named_ranks

FAULTS = {"mpirun-kill": signal.SIGKILL, "mpirun-stop": signal.SIGSTOP}
RANKS, DEADLINE_S, START_LIMIT_S = (2, 4), 1.0, 60.0
END_LIMIT_S = 30.0  # beyond the deadline there are last words and guards (processes/launch.py), on a busy machine
SIZES = ["--tokens", "512", "--hidden", "64", "--ffn", "128", "--experts", "8", "--iterations", "1000000"]
MARK = "FLASHMOE_LOST_RUN"  # in the environment of all that belongs to a run
MEETING = re.compile(
    r"rank \d+ (?:gave up|stopped) before [^,]+, while it waited for rank (?P<absent>\d+(?:, \d+)*) to come to meeting "
    r"\d+: (?:no rank made progress for [\d.]+ s|rank \d+ gave up)"
)


def one_run(fault: str, rng: np.random.Generator, backward: bool) -> Verdict:
    """Start `flashmoe run`, lose a rank of it within its first second of measured calls, and hear the others.

    Args:
        backward: has the run backwards?
    """
    ranks = int(rng.choice(RANKS))
    mapped: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        stderr = Path(folder) / "stderr"
        process = _start(ranks, folder, stderr, ["--backward"] if backward else [])
        try:
            _wait_for(lambda: "layer and BLAS" in stderr.read_text() or process.poll() is not None, START_LIMIT_S)
            mapped = _shared_memory(folder)
            victim = int(rng.integers(ranks))
            time.sleep(rng.uniform(0, 1))
            os.kill(_rank_pids(folder)[victim], FAULTS[fault])
            since_s = time.monotonic()
            process.wait(END_LIMIT_S)
            over_ms = 1000 * (time.monotonic() - since_s - DEADLINE_S)
            _wait_for(lambda: not _family(folder), END_LIMIT_S)
            verdict = _judge(stderr.read_text(), ranks, victim)
            verdict.over_ms.append(over_ms)
        except (TimeoutError, subprocess.TimeoutExpired, KeyError) as error:
            verdict = Verdict(problems=[f"{type(error).__name__}: {error}\n{stderr.read_text()}"])
        finally:
            for pid in _family(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    left = [name for name in mapped if Path(name).exists()]
    if left:
        verdict.problems.append(f"left in shared memory: {left}")
    return verdict


def _start(ranks: int, folder: str, stderr: Path, more: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-Pm", "flashmoe_numba", "run", "--preset", "laptop-tiny", "--ranks", str(ranks), *SIZES]
    environment = {name: value for name, value in os.environ.items() if name not in launch.RANK_VARIABLES}
    with stderr.open("w") as file:
        return subprocess.Popen(
            [*command, *more, "--deadline-s", str(DEADLINE_S)],
            env=environment | {MARK: folder, launch.TERMINAL_VARIABLE: "1", "HWLOC_XMLFILE": ""},
            stdout=subprocess.DEVNULL, stderr=file, start_new_session=True,
        )  # fmt: skip


def _wait_for(condition: Callable[[], bool], limit_s: float) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"not within {limit_s:g} s")
        time.sleep(0.02)


def _family(folder: str) -> dict[int, dict[str, str]]:
    """pid -> environment of all living processes of the run."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pairs = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
            variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if variables.get(MARK) == folder:
                found[int(entry.name)] = variables
    return found


def _shared_memory(folder: str) -> set[str]:
    """Names in /dev/shm of what the run's processes map."""
    found: set[str] = set()
    for pid in _family(folder):
        with contextlib.suppress(OSError):
            found.update(re.findall(r"/dev/shm/\S+", Path(f"/proc/{pid}/maps").read_text()))
    return found


def _rank_pids(folder: str) -> dict[int, int]:
    """rank -> pid: of the two processes with a rank's number, its guard and itself, the child."""
    parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in _family(folder)}
    numbers = {pid: variables.get("PMI_RANK") for pid, variables in _family(folder).items()}
    return {
        int(number): pid
        for pid, number in numbers.items()
        if number is not None and numbers.get(parents.get(pid, 0)) is not None
    }


def _judge(stderr: str, ranks: int, victim: int) -> Verdict:
    verdict = Verdict()
    lines = stderr.replace("\x1b[K", "").splitlines()
    said = [line.partition("flashmoe: error: ")[2] for line in lines if "flashmoe: error: " in line]
    for text in said:
        meeting = MEETING.fullmatch(text)
        named = {int(rank) for rank in meeting["absent"].split(", ")} if meeting else named_ranks(text)
        verdict.fell.append("meeting" if meeting else "call")
        if not named:
            verdict.problems.append(f"not a named error: {text}")
        elif victim in named:
            verdict.named += 1
        else:
            verdict.other.append(text)
    if len(said) != ranks - 1:
        verdict.problems.append(f"{len(said)} of {ranks - 1} ranks said something:\n{stderr}")
    return verdict
