"""One trial: a layer on several hosts makes calls, something is done to it, and every rank's end is looked at."""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from lost.verdict import named_ranks

from .calls import Work, expected
from .faults import FAULTS, FIRST, Harm, World
from .namespaces import Hosts, processes_in
from .started import Started

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

    @property
    def work(self) -> Work:
        return Work(num_ranks=self.num_ranks, num_tokens=self.num_tokens)


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


def one_trial(fault: str, size: Size, rng: np.random.Generator) -> Verdict:
    """Run it."""
    _compile_for(size.work)
    verdict = Verdict()
    with Hosts(FIRST + size.num_hosts) as hosts, tempfile.TemporaryDirectory(prefix="flashmoe_trial_") as name:
        folder, spaces = Path(name), hosts.networks()
        ranks = Started(hosts, size.num_ranks, folder, "rank.py", size.num_tokens, size.deadline_s)
        try:
            harm = _harm(fault, ranks, size, rng)
            _await_ends(harm, ranks, size)
            _judge(harm, ranks, size, verdict)
            verdict.problems += left_behind(ranks)
        except TimeoutError as error:
            verdict.problems.append(str(error))
        finally:
            ranks.close()
    if alive := processes_in(spaces):
        verdict.problems.append(f"processes outlive their hosts: {alive}")
    return verdict


@functools.cache
def _compile_for(work: Work) -> None:
    """The kernels are in the disk cache, so that no rank compiles while others wait."""
    next(expected(work))


def _harm(fault: str, ranks: Started, size: Size, rng: np.random.Generator) -> Harm:
    """Do it when all ranks make calls. Where all can go on, they are to end some calls later."""
    ranks.wait_for_calls(BEGIN_CALLS)
    time.sleep(rng.uniform(0, MOST_LATER_S))
    harm = FAULTS[fault](World(ranks.hosts, ranks.pids, size.ranks_per_host, size.deadline_s), rng)
    if not harm.apart:
        (ranks.folder / "stop.new").write_text(str(max(ranks.calls()) + MORE_CALLS))
        (ranks.folder / "stop.new").rename(ranks.folder / "stop")
    return harm


def _await_ends(harm: Harm, ranks: Started, size: Size) -> None:
    """Until every rank that can has said how it ended, or mpirun is over; then nobody waits for the others' words."""

    def all_said() -> bool:
        return bool(harm.apart) and set(ranks.errors()) >= set(harm.apart)

    ranks.wait_for_end(2 * size.deadline_s + size.slack_s + 5, all_said)
    (ranks.folder / "over").touch()


def left_behind(ranks: Started) -> list[str]:
    """What is there when all should have ended, in words."""
    hosts, limit = ranks.hosts, time.monotonic() + GONE_LIMIT_S
    while left := {name: len(found) for i, name in enumerate(hosts.names) if (found := hosts.processes(i))}:
        if time.monotonic() > limit:
            return [str(ranks.standstill(f"processes are left: {left}"))]
        time.sleep(0.05)
    memory = {name: names for i, name in enumerate(hosts.names) if (names := hosts.shared_memory(i))}
    files = [file.name for file in (ranks.folder / "tmp").iterdir()]
    return [f"shared memory is left: {memory}"] * bool(memory) + [f"files are left: {files}"] * bool(files)


def _judge(harm: Harm, ranks: Started, size: Size, verdict: Verdict) -> None:
    errors = ranks.errors()
    _compare(ranks, size, verdict)
    if not harm.apart and (status := ranks.process.poll()) != 0:
        verdict.problems.append(f"all should have gone on, and mpirun's status is {status}")
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


def _compare(ranks: Started, size: Size, verdict: Verdict) -> None:
    """Every result that there is with that of one process."""
    saved = [ranks.digests(rank) for rank in range(size.num_ranks)]
    verdict.calls = max(map(len, saved))
    for call, digests in zip(range(verdict.calls), expected(size.work), strict=False):
        for rank, want in enumerate(digests):
            if call < len(saved[rank]) and saved[rank][call] != want:
                verdict.problems.append(f"rank {rank}: wrong result of call {call}")
                return
