"""Which instructions of a linked kernel no world executed, and why: by the branch that nobody took to get there.

A reason is read from the text: from what the branch's predicate compares. What no rule knows is told by its branch.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from flashmoe_numba.ptx.listing import split
from flashmoe_numba.ptx.program import SOURCE, load

DIVISION = "the dividend or the divisor needs more than 32 bits, or is negative: no index or number of threads does"
TURNS = "further turns of an unrolled loop: a thread has fewer, or another number of them"
PARTS = "a second part of the router's or the down projection's matrix, which has one"
RECORD = "another thread is just leaving the same rank's record"
STATUS = "a function that Numba compiled says that it failed, which none can"
SEARCH = "the end of a loop that is always left before: a search that finds what is missing"
EXPONENT = "exp in float64 of numbers beyond 708, whose results are subnormal or infinite"
NOTHING = "a token block that sends nothing, at this place of an unrolled loop"
OTHER = "not explained"
EXPONENT_LIMITS = ("0f40874800", "0f4086232B")  # of the high word of a float64, as a float32


@dataclass(frozen=True)
class Gap:
    """Instructions [first, last] that never ran, and the branch that always went elsewhere."""

    first: int
    last: int
    branch: int
    reason: str

    @property
    def size(self):
        return self.last - self.first + 1


def instructions_executed(program, executed):
    """bool [instructions]: did all steps of each run, at least once?"""
    ran = np.ones(len(program.listing.instructions), bool)
    np.logical_and.at(ran, program.code[:, SOURCE], executed > 0)
    return ran


def gaps(program, ran):
    """All gaps; those that only other gaps lead to have the reason of the first of these."""
    listing, found = program.listing, []
    for run in _runs(~ran):
        branch = _entry(listing, ran, *run)
        reason = OTHER if branch is None else _reason(listing, branch)
        found.append(Gap(*run, -1 if branch is None else branch, reason))
    return [_inherit(listing, gap, found) if gap.branch < 0 else gap for gap in found]


def by_reason(found):
    """How many instructions each reason explains, the most first."""
    counts = Counter()
    for gap in found:
        counts[gap.reason] += gap.size
    return dict(counts.most_common())


def _runs(marks):
    indices = np.flatnonzero(marks)
    for part in np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1):
        if len(part):
            yield int(part[0]), int(part[-1])


def _entry(listing, ran, first, last):
    """The branch that ran and could have led there: the one before it, else one that names a label in it."""
    instructions = listing.instructions
    if first > 0 and instructions[first - 1].name == "bra" and instructions[first - 1].guard:
        return first - 1
    if first > 0 and instructions[first].guard and ran[first - 1] and instructions[first].name != "bra":
        return first
    for index in np.flatnonzero(ran):
        i = instructions[index]
        if i.name.startswith("bra") and i.guard and first <= listing.labels[i.operands[0]] <= last:
            return int(index)
    return None


def _inherit(listing, gap, found):
    for other in found:
        for i in listing.instructions[other.first : other.last + 1]:
            leads = i.name.startswith("bra") and gap.first <= listing.labels[i.operands[0]] <= gap.last
            if leads and other.branch >= 0:
                return Gap(gap.first, gap.last, other.branch, other.reason)
    return gap


def _writer(listing, index, register):
    """The last instruction before `index` that writes a register."""
    for i in reversed(listing.instructions[:index]):
        if i.operands and register in split(i.operands[0].strip("{}")):
            return i
    return None


def _reason(listing, branch):
    test = _writer(listing, branch, listing.instructions[branch].guard)
    if test is not None and test.name == "mov.pred":
        return STATUS
    if test is None or not test.name.startswith("setp"):
        return OTHER
    _, register, constant, *_ = test.operands
    value = _writer(listing, branch, register)
    if value is None:
        return OTHER
    if value.name == "and.b64" and value.operands[2] == "-4294967296":
        return DIVISION
    if test.name.endswith(".s32") and constant in ("0", "-2") and value.name == "mov.u32":
        return STATUS
    if test.name in ("setp.geu.f32", "setp.lt.f32") and constant in EXPONENT_LIMITS:
        return EXPONENT
    if test.name == "setp.ne.s64" and value.name == "ld.u64" and constant == "0":
        return NOTHING
    turns = value.operands[2] in ("1", "3") if value.name == "and.b64" else value.name == "add.s64" and constant == "1"
    if (test.name == "setp.eq.s64" and turns) or (test.name == "setp.lt.u64" and constant == "3"):
        return TURNS
    if test.name == "setp.gt.s64" and constant == "0" and not value.name.startswith("ld."):
        return SEARCH
    if test.name in ("setp.eq.s64", "setp.ne.s64") and constant == "2":
        return RECORD if value.name.startswith("ld.acquire") else PARTS if value.name.startswith("ld.") else OTHER
    return OTHER


def report(text, executed):
    """(instructions, how many never ran, {reason: how many}, lines of those that nothing explains)"""
    program = load(text)
    ran = instructions_executed(program, executed)
    found = gaps(program, ran)
    unexplained = [
        f"PTX lines {instructions[gap.first].line} to {instructions[gap.last].line}"
        for instructions in [program.listing.instructions]
        for gap in found
        if gap.reason == OTHER
    ]
    return len(ran), int((~ran).sum()), by_reason(found), unexplained
