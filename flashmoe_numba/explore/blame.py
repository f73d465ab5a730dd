"""What a host does when its blocks have ended: was the call given up, who is to blame, and are the records right?

In the order of `FlashMoE._raise_if_given_up` and `errors.explain`: it loads its own rank's abort word, then looks for
its own rank's record, which there may be, and for the one of the rank that the word names, which must be complete.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..kernel import signals as s
from .memory import Region
from .spec import WorldSpec
from .watched import ld_acquire


class Blame:
    """Control words of all ranks, watched."""

    def __init__(self, spec: WorldSpec, controls: Sequence[Region]) -> None:
        self._spec, self._controls = spec, controls

    def look(self, rank_idx: int) -> bool:
        """The running fiber is the rank's host, and looks whether the call was given up; what is wrong is reported."""
        culprit = ld_acquire(self._controls[rank_idx], s.ABORT) - 1
        if culprit < 0:
            return False
        if culprit not in self._spec.leavers:
            self._report(f"rank {rank_idx} names rank {culprit}, which did not give up")
            return True
        for other in dict.fromkeys((rank_idx, culprit)):
            self._read_record(rank_idx, other, must_be=other == culprit)
        return True

    def _read_record(self, reader: int, rank_idx: int, must_be: bool) -> None:
        control = self._controls[rank_idx]
        if ld_acquire(control, s.RECORD) != s.COMPLETE:
            if must_be:
                self._report(f"rank {reader} names rank {rank_idx}, whose record is not complete")
            return
        found = control[s.RECORD_BLOCK : s.RECORD_DEADLINE_NS + 1].tolist()
        wanted = [0, s.HOST, s.CLOSED_FLAG, rank_idx, 0, 0, self._spec.epochs, 0, 0, 0]
        if found != wanted:
            self._report(f"rank {reader} finds {found} in the record of rank {rank_idx}, wanted {wanted}")

    def _report(self, text: str) -> None:
        self._controls[0].memory.add("blame", text, text)

    def compare(self) -> str | None:
        """What is wrong with the abort words when all has ended: a rank that ended well is told by its next call."""
        named = [int(control.array[s.ABORT]) - 1 for control in self._controls]
        if len(set(named)) == 1 and named[0] in self._spec.leavers:
            return None
        return ", ".join(f"rank {i} names {f'rank {who}' if who >= 0 else 'nobody'}" for i, who in enumerate(named))
