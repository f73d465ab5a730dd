"""One trial: a layer on several hosts makes calls, something is done to it, and every rank's end is looked at."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lost.verdict import named_ranks

from flashmoe_numba.processes.launch import find_mpirun
from flashmoe_numba.processes.netmod import SURVIVING

from .calls import DIGEST_BYTES, expected
from .faults import FAULTS, FIRST, Harm, World
from .namespaces import Hosts

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
START_LIMIT_S = 300.0
BEGIN_CALLS = 5  # before anything is done
MORE_CALLS = 60  # after what does no lasting harm
MOST_LATER_S = 1.0
GONE_LIMIT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of a trial."""

    num_hosts: int = 2
    ranks_per_host: int = 2
    num_tokens: int = 24
    deadline_s: float = 2.0
    slack_s: float = 2.0  # what an error may take beyond the deadline, on a busy machine

    @property
    def num_ranks(self) -> int:
        return self.num_hosts * self.ranks_per_host


@dataclass
class Verdict:
    """Ranks by what they ended with, and what is not as it should be, in words."""

    right: int = 0  # all results were right, to the last call
    named: int = 0  # the error names a rank that was lost
    other: list[str] = field(default_factory=list)  # it names one that waited itself
    ended: int = 0  # by mpirun, where it may
    calls: int = 0
    over_ms: list[float] = field(default_factory=list)  # errors: time since the fault, less the deadline
    problems: list[str] = field(default_factory=list)


def one_trial(fault: str | None, size: Size, rng: np.random.Generator, num_calls: int = 0) -> Verdict:
    """Run it, with a fault or for so many calls."""
    with Hosts(FIRST + size.num_hosts) as hosts, tempfile.TemporaryDirectory(prefix="flashmoe_trial_") as name:
        folder, verdict = Path(name), Verdict()
        with (folder / "stderr").open("w") as stderr:
            process = _start(hosts, size, folder, stderr)
            try:
                harm = _harm(fault, hosts, size, folder, process, rng, num_calls)
                _await_ends(harm, size, folder, process)
                _judge(harm, size, folder, verdict)
                _await_silence(hosts, harm, verdict)
            except TimeoutError as error:
                said = (folder / "stderr").read_text()[-3000:]
                verdict.problems.append(f"{error}; calls {_calls(folder, size)}, errors {_errors(folder)}\n{said}")
            finally:
                hosts.close()
                process.wait()
        return verdict


def _start(hosts: Hosts, size: Size, folder: Path, stderr: object) -> subprocess.Popen[bytes]:
    where = hosts.where(size.num_ranks, range(FIRST, FIRST + size.num_hosts))
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("PMI_", "PMIX_", "OMPI_", "HYDRA_"))
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    rank = [sys.executable, "-P", str(HERE / "rank.py"), str(folder), str(size.num_tokens), str(size.deadline_s)]
    return subprocess.Popen(
        [*hosts.on(0), find_mpirun(), *where, *rank],
        env=own | SURVIVING | {"PYTHONPATH": path, "HWLOC_XMLFILE": ""},
        stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
    )  # fmt: skip


def _harm(
    fault: str | None,
    hosts: Hosts,
    size: Size,
    folder: Path,
    process: subprocess.Popen[bytes],
    rng: np.random.Generator,
    num_calls: int,
) -> Harm:
    """Do it when all ranks make calls. Where all can go on, they are to end some calls later."""
    first = min(BEGIN_CALLS, num_calls or BEGIN_CALLS)
    _wait_for(lambda: min(_calls(folder, size)) >= first, START_LIMIT_S, process, "ranks do not begin")
    pids = [int((folder / f"{rank}.pid").read_text()) for rank in range(size.num_ranks)]
    if fault is None:
        harm = Harm(set(), {}, time.monotonic())
    else:
        time.sleep(rng.uniform(0, MOST_LATER_S))
        harm = FAULTS[fault](World(hosts, pids, size.ranks_per_host, size.deadline_s), rng)
    if not harm.apart:
        last = max(num_calls, max(_calls(folder, size)) + MORE_CALLS if fault else 0)
        (folder / "stop.new").write_text(str(last))
        (folder / "stop.new").rename(folder / "stop")
    return harm


def _await_ends(harm: Harm, size: Size, folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Until every rank that can has said how it ended, or mpirun is over; as long as calls are made."""

    def ended() -> bool:
        return process.poll() is not None or (bool(harm.apart) and set(_errors(folder)) >= set(harm.apart))

    calls, limit_s = -1, 2 * size.deadline_s + size.slack_s + 5
    since = time.monotonic()
    while not ended():
        if (now := sum(_calls(folder, size))) != calls:
            calls, since = now, time.monotonic()
        if time.monotonic() - since > limit_s:
            raise TimeoutError(f"not all ranks have ended, and no call was made for {limit_s:g} s")
        time.sleep(0.02)


def _await_silence(hosts: Hosts, harm: Harm, verdict: Verdict) -> None:
    """Where all can end by themselves, or mpirun ends them, nothing is left soon after."""
    if harm.apart and not harm.at_once:
        return
    limit = time.monotonic() + GONE_LIMIT_S
    while left := {hosts.names[i]: len(found) for i in range(len(hosts.names)) if (found := hosts.processes(i))}:
        if time.monotonic() > limit:
            verdict.problems.append(f"processes are left: {left}")
            return
        time.sleep(0.05)


def _judge(harm: Harm, size: Size, folder: Path, verdict: Verdict) -> None:
    errors = _errors(folder)
    _compare(size, folder, verdict)
    for rank in sorted(set(range(size.num_ranks)) - harm.lost):
        if rank in errors:
            _judge_error(rank, *errors[rank], harm, size, verdict)
        elif rank not in harm.apart:
            verdict.right += 1
        elif harm.at_once:
            verdict.ended += 1
        else:
            verdict.problems.append(f"rank {rank} said nothing")


def _judge_error(rank: int, when: float, text: str, harm: Harm, size: Size, verdict: Verdict) -> None:
    if rank not in harm.apart:
        verdict.problems.append(f"rank {rank} should have gone on: {text}")
        return
    over_s = when - harm.begun - size.deadline_s
    verdict.over_ms.append(1000 * over_s)
    if over_s > size.slack_s:
        verdict.problems.append(f"rank {rank}: {over_s:.2f} s beyond the deadline: {text}")
    named = named_ranks(text.removeprefix("FlashMoEError: "))
    if not named:
        verdict.problems.append(f"rank {rank}: not a named error: {text}")
    elif named & harm.apart[rank]:
        verdict.named += 1
    else:
        verdict.other.append(f"rank {rank}: {text}")


def _compare(size: Size, folder: Path, verdict: Verdict) -> None:
    """Every result that there is with that of one process."""
    saved = [(folder / f"{rank}.digests").read_bytes() for rank in range(size.num_ranks)]
    counts = [len(part) // DIGEST_BYTES for part in saved]
    verdict.calls = max(counts)
    for call, digests in zip(range(max(counts)), expected(size.num_ranks, size.num_tokens), strict=False):
        for rank, want in enumerate(digests):
            if call < counts[rank] and saved[rank][call * DIGEST_BYTES :][:DIGEST_BYTES] != want:
                verdict.problems.append(f"rank {rank}: wrong result of call {call}")
                return


def _calls(folder: Path, size: Size) -> list[int]:
    """That each rank has made."""
    files = [folder / f"{rank}.digests" for rank in range(size.num_ranks)]
    return [file.stat().st_size // DIGEST_BYTES if file.exists() else 0 for file in files]


def _errors(folder: Path) -> dict[int, tuple[float, str]]:
    """rank -> when, what."""
    return {int(file.stem): _parse(file.read_text()) for file in folder.glob("*.error")}


def _parse(text: str) -> tuple[float, str]:
    when, _, what = text.partition(" ")
    return float(when), what


def _wait_for(condition: Callable[[], bool], limit_s: float, process: subprocess.Popen[bytes], what: str) -> None:
    limit = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > limit or process.poll() is not None:
            raise TimeoutError(f"{what}: mpirun's status is {process.poll()}")
        time.sleep(0.02)
