"""When a call is given up: may it be, do all ranks hear of it, and is the right one named?

What a host does when its blocks have ended is done here in the order of `Life.raise_if_given_up` and
`failures.explain`: it loads its own rank's abort word, then looks for its own rank's record, which there may be, and
for the one of the rank that the word names, which must be complete.

Deadlines are in switches, and a schedule may let anybody wait for long. So nobody is told off for giving up after a
silence that there was, and whom a record names is asked only where the schedule was fair: by docs/explorer.md, nobody
but a lost rank can be named then.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from greenlet import getcurrent

from reference import Layout

from ...device.fibers import clock
from ...kernel import control as s
from ...kernel.signals import CALL_SHIFT, EPOCH_SHIFT, backward_of
from .memory import Region
from .spec import WorldSpec
from .watched import ld_acquire

LONG, LONG_APART = 17, 20  # twentieths of a deadline: silences after which all who wait are known to
FLAGS = {s.SUBSCRIBER: (s.DISPATCH_FLAG, s.RESULT_FLAG, s.GATE_FLAG), s.PROCESSOR: (s.TASK_FLAG,)}


class CallingHost(Protocol):
    """What is asked of a host (hosts.py)."""

    calls: list[list[Any]]
    is_lost: bool
    is_told: bool

    def finished_task(self) -> None:
        """One of its processors has finished a task."""


class Blame:
    """Control words of all ranks, watched.

    Args:
        segments: `Segments` of each rank, of watched regions.
        images: control words of a rank on another host, as a rank sees them: by that one and the other.
    """

    def __init__(self, spec: WorldSpec, segments: Sequence[Any], images: Mapping[tuple[int, int], Region]) -> None:
        self._spec, self._segments, self._images = spec, segments, images
        self._controls: list[Region] = [each.control for each in segments]
        self._memory = self._controls[0].memory
        if spec.can_stop:
            for rank_idx, control in enumerate(self._controls):
                control.on_store = partial(self._stored, rank_idx)
            for (rank_idx, _), image in images.items():
                image.on_store = partial(self._heard, rank_idx)

    def begin(self, hosts: Mapping[int, CallingHost]) -> None:
        """A new run; `hosts` by the first rank of each."""
        self._hosts = hosts
        self._ended: list[list[int]] = [[] for _ in self._controls]  # when tasks did, as far as each rank can see
        self._silences: dict[int, tuple[int, int]] = {}  # last task, and when a rank gave up

    # ---- while the kernel runs

    def _stored(self, rank_idx: int, i: int, value: int) -> None:
        if i == s.PROGRESS:
            for other in range(len(self._ended)):
                if (other, rank_idx) not in self._images:
                    self._ended[other].append(clock())
            self._hosts[rank_idx].finished_task()
        elif i == s.RECORD and value == s.WRITING:
            self._check_silence(rank_idx)
        elif i == s.ABORT and self._seen(rank_idx, value - 1).array[s.RECORD] != s.COMPLETE:
            who = getcurrent().actor.rank
            self._report(f"rank {who} tells rank {rank_idx} of rank {value - 1}, whose record is not complete")

    def _heard(self, rank_idx: int, i: int, _: int) -> None:
        """News of a rank on another host."""
        if i == s.PROGRESS:
            self._ended[rank_idx].append(clock())

    def _seen(self, rank_idx: int, other: int) -> Region:
        """The control words of another rank, where this one looks for them."""
        return self._images.get((rank_idx, other), self._controls[other])

    def _check_silence(self, rank_idx: int) -> None:
        """A block gives up: when it took the time last, nobody had finished a task for long.

        A wait does not see what ended before its first look, nor while it reads, each a quarter of a deadline at most,
        nor what has not arrived.
        """
        time, deadline = getcurrent().actor.time, self._spec.deadline
        if time is None or deadline is None:  # a host that leaves
            return
        ended = self._ended[rank_idx]
        before = bisect_right(ended, time)
        last = ended[before - 1] if before else 0
        self._silences[rank_idx] = last, time
        if time - last < deadline // 2 - self._memory.arrives_within:
            self._report(f"rank {rank_idx} gives up {time - last} switches after a task, of a deadline of {deadline}")

    # ---- when the blocks of a rank have ended

    def look(self, rank_idx: int) -> bool:
        """The running fiber is the rank's host, and looks whether the call was given up; what is wrong is reported."""
        culprit = ld_acquire(self._controls[rank_idx], s.ABORT) - 1
        if culprit < 0:
            return False
        if self._spec.deadline is None and culprit not in self._spec.leavers and not self._spec.astray:
            self._report(f"rank {rank_idx} names rank {culprit}, which did not give up")
            return True
        for other in dict.fromkeys((rank_idx, culprit)):
            self._read_record(rank_idx, other, must_be=other == culprit)
        return True

    def _read_record(self, reader: int, rank_idx: int, must_be: bool) -> None:
        control = self._seen(reader, rank_idx)
        if ld_acquire(control, s.RECORD) != s.COMPLETE:
            if must_be:
                self._report(f"rank {reader} names rank {rank_idx}, whose record is not complete")
            return
        found = s.record_fields(control)
        if self._spec.astray and found.flag == s.OTHER_CALL:
            if not self._tells_of_another_call(rank_idx, found):
                self._report(f"rank {reader} finds {[*found]} in the record of rank {rank_idx}, of no call there is")
        elif found.role == s.HOST or self._spec.deadline is None:
            wanted = s.departure(rank_idx, self._spec.epochs, s.FAILED, 0)
            if found != wanted:
                told = f"{[*found]} in the record of rank {rank_idx}, wanted {[*wanted]}"
                self._report(f"rank {reader} finds {told}")
        elif not self._is_legal(found):
            self._report(f"rank {reader} finds {[*found]} in the record of rank {rank_idx}, which no wait can write")

    def _tells_of_another_call(self, rank_idx: int, record: s.AbortRecord) -> bool:
        """Does it name a packet of the last call, and both calls, as the program has them?"""
        c, last = self._spec.config, self._spec.epochs
        calls = [self._spec.forward_of(rank, last) for rank in range(c.num_ranks)]
        own, other = (backward_of(calls[rank]) if calls[rank] else 0 for rank in (rank_idx, record.peer))
        told = record.role, record.block, record.epoch, record.m, record.found >> CALL_SHIFT
        wanted = s.SUBSCRIBER, self._spec.num_processors, last, own, last << EPOCH_SHIFT - CALL_SHIFT | other
        return told == wanted and own != other

    def _is_legal(self, record: s.AbortRecord) -> bool:
        block, role, flag, peer, expert, _, epoch, _, missing, deadline = record
        c, processors = self._spec.config, self._spec.num_processors
        blocks = {s.SUBSCRIBER: (processors,), s.PROCESSOR: range(processors)}
        if role not in blocks or block not in blocks[role] or flag not in FLAGS[role]:
            return False
        indices = 0 <= peer < c.num_ranks and 0 <= expert < c.num_experts_per_rank and 1 <= epoch <= self._spec.epochs
        return indices and missing > 0 and deadline == self._spec.deadline

    def _report(self, text: str) -> None:
        self._memory.add("blame", text, text)

    # ---- when all has ended

    def compare(self) -> str | None:
        """What is wrong with abort words, with who was told, and with who is named: one sentence."""
        return self._words() or self._ends() or self._names()

    def _words(self) -> str | None:
        """Who gave up and was not lost has told all; if all were in the midst of it, not all need have been told.

        One host has one of its own ranks to name, unless its first rank had heard of another host's before.
        """
        named = [int(control.array[s.ABORT]) - 1 for control in self._controls]
        gave_up = [rank for rank, control in enumerate(self._controls) if s.record_in(control.array)]
        may_be_silent = all(self._hosts[rank].is_lost for rank in gave_up)
        agreed = all(self._is_one_culprit(named, ranks) for ranks in self._spec.of_hosts.ranks)
        if agreed and set(named) - {-1} <= set(gave_up) and (may_be_silent or -1 not in named):
            return None
        return ", ".join(f"rank {i} names {f'rank {who}' if who >= 0 else 'nobody'}" for i, who in enumerate(named))

    def _is_one_culprit(self, named: list[int], ranks: Sequence[int]) -> bool:
        """Of those on one host whom these name, there is one at most."""
        return named[ranks[0]] not in (-1, *ranks) or len({named[rank] for rank in ranks} & set(ranks)) <= 1

    def _ends(self) -> str | None:
        """Nobody can end a call that a lost rank never began; and whose calls have not ended was told why."""
        for rank, host in self._hosts.items():
            ended = len(host.calls[0])
            if ended < self._spec.epochs and not (host.is_lost or host.is_told):
                return f"rank {rank} stopped after call {ended}, and nobody told it to"
            for lost in self._spec.lost:
                if lost.tasks == 0 and ended >= lost.call:
                    return f"rank {rank} ended call {lost.call}, which rank {lost.rank} never began"
            if self._spec.astray and ended == self._spec.epochs:
                return f"rank {rank} ended call {ended}, in which others made another call"
        return None

    def _names(self) -> str | None:
        for rank, control in enumerate(self._controls):
            record = s.record_in(control.array)
            if record and self.is_fair(rank):
                wrong = self._wrong_name(rank, record)
                if wrong:
                    return wrong
        return None

    def is_fair(self, rank: int) -> bool:
        """The rank gave up after a long silence, in which everybody came round often."""
        if rank not in self._silences or self._hosts[rank].is_lost:
            return False
        assert self._spec.deadline is not None
        last, time = self._silences[rank]
        long = LONG if self._spec.hosts == 1 else LONG_APART
        is_long = 20 * (time - last) >= long * self._spec.deadline
        return is_long and self._memory.last_long_turn <= last + self._memory.fair_turn

    def _wrong_name(self, rank: int, record: s.AbortRecord) -> str | None:
        if record.role == s.HOST or self._a_lost_one_waited_itself(record.epoch):
            return None
        peer, flag = record.peer, record.flag
        if not self._hosts[peer].is_lost:
            return f"rank {rank} blames rank {peer} for flag {flag} in call {record.epoch}, which was not lost"
        word, last = self._flags(rank, record)
        if word >> EPOCH_SHIFT == record.epoch or record.found != last:
            return f"rank {rank} blames rank {peer} for flag {flag} of {record.found}, but it is {word}, before {last}"
        return None

    def _a_lost_one_waited_itself(self, epoch: int) -> bool:
        """Then the first flag that is missing is named, whosever it is."""
        lost = [control for rank, control in enumerate(self._controls) if self._hosts[rank].is_lost]
        return any(control.array[s.SILENT] >= max(1, epoch - 1) for control in lost)

    def _flags(self, rank: int, record: s.AbortRecord) -> tuple[int, int]:
        """The flag that the record says was waited for, and the last call's, which may be the same."""
        packet = record.peer * self._spec.config.num_experts_per_rank + record.expert
        if record.flag == s.DISPATCH_FLAG:
            words = self._segments[rank].dispatch_flag.array[2 * packet : 2 * packet + 2]
            return int(words[record.epoch & 1]), int(words[1 - (record.epoch & 1)])
        word = int(self._segments[rank].result_flag.array[packet * Layout(self._spec.config).row_blocks + record.m])
        return word, word
