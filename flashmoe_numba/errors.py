"""Why a call did not finish, said in words."""

from __future__ import annotations

import numpy as np

from .kernel import signals as s

_SAME_CALLS = "every rank must make the same calls"
ROLES = {s.SUBSCRIBER: "OS block", s.PROCESSOR: "processor", s.HOST: "host"}


class FlashMoEError(RuntimeError):
    """A call was given up: some rank waited for a signal that never came, or left. The layer cannot be used again."""


def describe(rank_idx: int, control: np.ndarray) -> str | None:
    """What the rank with these control words waited for when it gave up; None if it did not give up."""
    if control[s.RECORD] != s.COMPLETE:
        return None
    words = (int(word) for word in control[s.RECORD_BLOCK :][:10])
    block, role, flag, peer, expert, m, epoch, found, missing, deadline_ns = words
    if flag == s.CLOSED_FLAG:
        return f"rank {rank_idx} {_why_it_left(m, epoch)}"
    waited_for = {
        s.DISPATCH_FLAG: f"the dispatch flag of rank {peer} for expert {expert} here",
        s.RESULT_FLAG: f"the result flag of rank {peer}, its expert {expert}, row tile {m}",
        s.GATE_FLAG: "the gate of this rank",
        s.TASK_FLAG: f"task {m} of this rank's queue",
    }[flag]
    holds = f"; it holds epoch {found >> s.EPOCH_SHIFT}" if flag in (s.DISPATCH_FLAG, s.RESULT_FLAG) else ""
    absent = _absent(peer, found >> s.EPOCH_SHIFT, epoch) if flag == s.DISPATCH_FLAG else ""
    return (
        f"rank {rank_idx}, block {block} ({ROLES[role]}) gave up in epoch {epoch}: waited for {waited_for}{holds}; "
        f"{missing} flags missing, and no rank finished a task for about {deadline_ns / 1e9:g} s{absent}"
    )


def _absent(peer: int, last: int, epoch: int) -> str:
    return (
        f"; rank {peer} came as far as call {last}, this one is at call {epoch}: it makes fewer calls ({_SAME_CALLS}), "
        "was later than deadline_s allows, or is gone"
    )


def _why_it_left(why: int, epoch: int) -> str:
    return {
        s.FAILED: f"left in epoch {epoch} because of an error of its own",
        s.CLOSED_BY_THREAD: f"left in epoch {epoch} because close() was called in another thread",
        s.CLOSED_EARLY: f"closed its layer after {epoch} calls, and another rank made one more; {_SAME_CALLS}",
    }[why]


def explain(rank_idx: int, controls: list[np.ndarray]) -> str | None:
    """Why rank `rank_idx` stopped, from the control words of all ranks; None if it did not."""
    culprit = int(controls[rank_idx][s.ABORT]) - 1
    if culprit < 0:
        return None
    own = describe(rank_idx, controls[rank_idx])
    cause = describe(culprit, controls[culprit]) or f"rank {culprit} gave up"
    if own is not None or culprit == rank_idx:
        return own or cause
    return f"rank {rank_idx} stopped: {cause}"
