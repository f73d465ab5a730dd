"""Why a call did not finish, said in words."""

from __future__ import annotations

import numpy as np

from ..kernel import control as c
from ..kernel.signals import EPOCH_SHIFT, call_in, forward_of

_SAME_CALLS = "every rank must make the same calls"
ROLES = {c.SUBSCRIBER: "OS block", c.PROCESSOR: "processor", c.HOST: "host"}


def describe(rank_idx: int, control: np.ndarray) -> str | None:
    """What the rank with these control words waited for when it gave up; None if it did not give up."""
    r = c.record_in(control)
    if r is None:
        return None
    if r.flag == c.CLOSED_FLAG:
        return f"rank {rank_idx} {_why_it_left(r.m, r.epoch)}"
    if r.flag == c.OTHER_CALL:
        theirs, ours = (_name_of_call(call, r.epoch) for call in (call_in(r.found), r.m))
        wrong = f"rank {r.peer} makes {theirs}, and this one {ours}"
        return f"rank {rank_idx} gave up in epoch {r.epoch}: {wrong}; {_SAME_CALLS}"
    waited_for = {
        c.DISPATCH_FLAG: f"the dispatch flag of rank {r.peer} for expert {r.expert} here",
        c.RESULT_FLAG: f"the result flag of rank {r.peer}, its expert {r.expert}, row tile {r.m}",
        c.GATE_FLAG: "the gate of this rank",
        c.TASK_FLAG: f"task {r.m} of this rank's queue",
    }[r.flag]
    last = r.found >> EPOCH_SHIFT
    holds = f"; it holds epoch {last}" if r.flag in (c.DISPATCH_FLAG, c.RESULT_FLAG) else ""
    absent = _absent(r.peer, last, r.epoch) if r.flag == c.DISPATCH_FLAG else ""
    if last > r.epoch:  # which came before it
        holds, absent = f"; that of epoch {last} is here", ""
    return (
        f"rank {rank_idx}, block {r.block} ({ROLES[r.role]}) gave up in epoch {r.epoch}: "
        f"waited for {waited_for}{holds}; {r.missing} flags missing, "
        f"and no rank finished a task for about {r.deadline_ns / 1e9:g} s{absent}"
    )


def _absent(peer: int, last: int, epoch: int) -> str:
    return (
        f"; rank {peer} came as far as call {last}, this one is at call {epoch}: it makes fewer calls ({_SAME_CALLS}), "
        "was later than deadline_s allows, or is gone"
    )


def _name_of_call(call: int, epoch: int) -> str:
    """Of a call of this epoch, as a packet's word has it."""
    return "a forward" if call == 0 else f"the backward of call {forward_of(call, epoch)}"


def _why_it_left(why: int, epoch: int) -> str:
    return {
        c.FAILED: f"left in epoch {epoch} because of an error of its own",
        c.CLOSED_BY_THREAD: f"left in epoch {epoch} because close() was called in another thread",
        c.CLOSED_EARLY: f"closed its layer after {epoch} calls, and another rank made one more; {_SAME_CALLS}",
    }[why]


def explain(rank_idx: int, controls: list[np.ndarray]) -> str | None:
    """Why rank `rank_idx` stopped, from the control words of all ranks; None if it did not."""
    culprit = int(controls[rank_idx][c.ABORT]) - 1
    if culprit < 0:
        return None
    own = describe(rank_idx, controls[rank_idx])
    cause = describe(culprit, controls[culprit]) or f"rank {culprit} gave up"
    if own is not None or culprit == rank_idx:
        return own or cause
    return f"rank {rank_idx} stopped: {cause}"
