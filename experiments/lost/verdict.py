"""What every rank has to say at the end of a run: right results, or an error that names a lost rank, in time."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass, field

from . import memory as m
from .run import Run

GAVE_UP = re.compile(
    r"rank \d+(?: stopped: rank \d+)?, block \d+ \(OS block\) gave up in epoch \d+: waited for "
    r"(?:the dispatch flag of rank (?P<source>\d+) for expert \d+ here|"
    r"the result flag of rank (?P<owner>\d+), its expert \d+, row tile \d+); it holds epoch \d+; "
    r"\d+ flags missing, and no rank finished a task for about [\d.]+ s"
    r"(?:; rank (?P=source) came as far as call \d+, this one is at call \d+: it makes fewer calls .*, or is gone)?"
)
LEFT = re.compile(r"rank \d+ stopped: rank (?P<left>\d+) left in epoch \d+ because of an error of its own")


@dataclass
class Verdict:
    """Ranks by what they ended with, and what is not as it should be, in words."""

    right: int = 0
    named: int = 0
    other: list[str] = field(default_factory=list)  # errors that name a wait for a rank that waited itself
    over_ms: list[float] = field(default_factory=list)  # errors: time since the last fault before it, less the deadline
    problems: list[str] = field(default_factory=list)
    fell: list[str] = field(default_factory=list)  # where signals met their rank


def judge(run: Run, victims: set[int], slack_s: float) -> Verdict:
    """Look at every rank of a run that has ended, the `victims` that could go on included."""
    verdict = Verdict(fell=run.fell)
    for rank_idx in range(run.num_ranks):
        _judge_rank(run, rank_idx, victims, slack_s, verdict)
    return verdict


def _judge_rank(run: Run, rank_idx: int, victims: set[int], slack_s: float, verdict: Verdict) -> None:
    words, text, status = run.memory.words[rank_idx], run.memory.text(rank_idx), run.status(rank_idx)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if words[m.OUTCOME] == m.NONE and rank_idx in run.lost and killed:
        return
    if words[m.OUTCOME] == m.RAISED and rank_idx in run.raised:
        return
    if words[m.OUTCOME] == m.RIGHT:
        verdict.right += 1
    elif words[m.OUTCOME] == m.GIVEN_UP:
        _judge_error(run, rank_idx, victims, slack_s, verdict)
    else:
        verdict.problems.append(f"rank {rank_idx}: outcome {words[m.OUTCOME]}, wait status {status}: {text}")


def _judge_error(run: Run, rank_idx: int, victims: set[int], slack_s: float, verdict: Verdict) -> None:
    text, words = run.memory.text(rank_idx), run.memory.words[rank_idx]
    ended_ns = int(words[m.ENDED_NS])
    faults_ns = [*run.faults_ns, *run.memory.words[:, [m.FAULT_NS, m.LATE_NS]].flat]
    since_ns = max(fault_ns for fault_ns in faults_ns if fault_ns <= ended_ns)
    over_s = (ended_ns - since_ns) / 1e9 - run.world.deadline_s
    verdict.over_ms.append(1000 * over_s)
    if over_s > slack_s:
        verdict.problems.append(f"rank {rank_idx}: {over_s:.2f} s beyond the deadline: {text}")
    named = named_ranks(text)
    if not named:
        verdict.problems.append(f"rank {rank_idx}: not a named error: {text}")
    elif named & victims:
        verdict.named += 1
    else:
        verdict.other.append(f"rank {rank_idx}: {text}")


def named_ranks(text: str) -> set[int]:
    """The rank that an error of the layer says it waited for, or that left; none if it is not such an error."""
    told = GAVE_UP.fullmatch(text) or LEFT.fullmatch(text)
    return {int(rank) for rank in told.groups() if rank is not None} if told else set()
