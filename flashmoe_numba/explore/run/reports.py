"""What can be wrong with a run, and where in the kernel's source."""

from __future__ import annotations

import re
from types import CodeType, FrameType
from typing import Any, NamedTuple

KINDS = {
    "race": "two accesses to one cell, one of them a write and not both atomic, that nothing orders",
    "poison": "a cell is read that nobody has written",
    "out of bounds": "an index outside of its array, or an address where no array begins",
    "conflict": "a rank wrote where another's rows or flags belong, or one place twice in a call",
    "barrier": "lanes of a block meet at barriers in different places",
    "deadlock": "nobody can go on",
    "livelock": "nobody finishes",
    "wrong result": "not what the reference computes, or other bits than under another seed",
    "tiles": "an expert's rows are not each in one row tile, or a tile has more rows or another name than it may",
    "count": "a task ran twice, never, or is none of the layer's",
    "blame": "after a call that was given up, ranks name different culprits, or one whose record is not complete",
    "error": "the kernel raised an exception",
}


class Site(NamedTuple):
    """An access that a report is about."""

    who: str
    call: int
    where: str  # function:line


class Report(NamedTuple):
    """One finding; `cell` and `sites`, in the order of the run, where it is about accesses."""

    kind: str  # of KINDS
    text: str
    cell: tuple[str, Any] | None = None  # array and index
    sites: tuple[Site, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


def finding(report: Report) -> tuple[str, ...]:
    """What makes reports of worlds of any size the same finding: kind, array without its rank, and places."""
    array = re.sub(r"^rank \d+ | of (block|call|room) \d+$", "", report.cell[0]) if report.cell else ""
    raised = report.text.partition(":")[0] if report.kind == "error" else ""
    return report.kind, array, raised, *sorted(site.where for site in report.sites)


class Stopped(Exception):
    """The kernel cannot go on after this finding, which has been reported."""


def place(code: CodeType, instruction: int) -> str:
    """`function:line` of an instruction."""
    for start, end, line in code.co_lines():
        if start <= instruction < end and line is not None:
            return f"{code.co_name}:{line}"
    return code.co_name


def kernel_frame(frame: FrameType) -> FrameType:
    """The innermost frame that is not of a verb: verbs mark their module with `IS_VERB`."""
    while "IS_VERB" in frame.f_globals and frame.f_back:
        frame = frame.f_back
    return frame
