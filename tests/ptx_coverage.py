"""Which instructions of a linked kernel no world executed, and why: by the branch that nobody took to get there.

A reason is read from the text: from what the branch's predicate compares, or from the field of the rank's arguments
that is loaded there. What no rule knows is told by its branch.
"""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
from ptx_faults_words import places

from flashmoe_numba.build.likeness import like_arguments
from flashmoe_numba.kernel.grid import HEADER_WORDS
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
COLUMN = "a part of a row that is one column: where tensor cores multiply, rows are whole parts of 16 bytes"
LARGEST = "a logit that is the largest so far, at this place of an unrolled loop"
SHARED = "a launch with less shared memory than a tile's sums, which no layer makes"
KIND = "a kind of task that there is not"
BOUND = "the bound of a slice that is negative even when counted from the end, which none is"
OTHER = "not explained"
LEAST = "-9223372036854775808"  # that nothing can be divided by -1
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


def gaps(program, ran, fields):
    """All gaps; those that only other gaps lead to have the reason of the first of these.

    Args:
        fields: names of the fields of a rank's arguments, by their offset.
    """
    listing, found = program.listing, []
    for run in _runs(listing, ~ran):
        branch = _entry(listing, ran, *run)
        reason = OTHER if branch is None else _reason(listing, branch, listing.instructions[run[0]], fields)
        found.append(Gap(*run, -1 if branch is None else branch, reason))
    return _inherited(listing, found)


def by_reason(found):
    """How many instructions each reason explains, the most first."""
    counts = Counter()
    for gap in found:
        counts[gap.reason] += gap.size
    return dict(counts.most_common())


def _runs(listing, marks):
    """First and last of each run of marked instructions; one ends where nothing goes on to the next instruction."""
    indices = np.flatnonzero(marks)
    ends = [(i.name.startswith("bra") or i.name == "ret") and not i.guard for i in listing.instructions]
    for part in np.split(indices, np.flatnonzero((np.diff(indices) > 1) | np.array(ends)[indices[:-1]]) + 1):
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


def _inherited(listing, found):
    """Gaps without a branch take it from one that leads there, which may have taken its own."""
    while True:
        more = [gap if gap.branch >= 0 else _inherit(listing, gap, found) for gap in found]
        if more == found:
            return found
        found = more


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


def _has_tensor_cores(listing):
    return any(i.name.startswith("wgmma.mma_async") for i in listing.instructions)


OF_ONE_PART = ("router", "down", "shared_down", "shared_gate")


def _reason(listing, branch, first, fields):
    """Why a branch never goes to the instruction `first`."""
    test = _writer(listing, branch, listing.instructions[branch].guard)
    if first.name.startswith("ld.") and _field(first, fields) in [f"experts.{name}.second" for name in OF_ONE_PART]:
        return PARTS
    if test is None:
        return OTHER
    if test.name == "mov.pred":
        return STATUS
    if test.name in ("and.pred", "or.pred"):
        parts = [_writer(listing, branch, register) for register in test.operands[1:]]
        return DIVISION if any(part is not None and LEAST in part.operands for part in parts) else OTHER
    if not test.name.startswith("setp"):
        return OTHER
    value = _writer(listing, branch, test.operands[1])
    return OTHER if value is None else _reason_of(listing, branch, test, value, fields)


def _reason_of(listing, branch, test, value, fields):
    """By what is compared: a value, as an instruction made it, with a constant."""
    comparison, constant = test.name.removeprefix("setp.").replace("b64", "s64"), test.operands[2]
    if value.name == "and.b64" and value.operands[2] == "-4294967296":
        return DIVISION
    if comparison.endswith(".s32") and constant in ("0", "-2") and value.name == "mov.u32":
        return STATUS
    if comparison in ("geu.f32", "lt.f32") and constant in EXPONENT_LIMITS:
        return EXPONENT
    if comparison == "ne.s64" and value.name in ("ld.u64", "ld.b64") and constant == "0":
        return NOTHING
    if comparison == "leu.f32" and value.name in ("ld.f32", "ld.b32"):
        return LARGEST
    if _counts_turns(comparison, constant, value):
        return TURNS
    if comparison == "gt.s64" and constant == "0" and not value.name.startswith("ld."):
        return SEARCH
    if (comparison, value.name, constant) == ("eq.s64", "min.s64", "1") and _has_tensor_cores(listing):
        return COLUMN
    if value.name == "mov.u32" and value.operands[1] == "%dynamic_smem_size":
        return SHARED
    if (comparison, value.name, value.operands[-1]) == ("eq.b16", "and.b16", "255"):
        return KIND
    if (comparison, constant) in (("lt.s64", "0"), ("gt.s64", "-1")) and _is_wrapped(listing, branch, value):
        return BOUND
    if comparison in ("eq.s64", "ne.s64") and constant == "2":
        if value.name.startswith("ld.acquire"):
            return RECORD
        return PARTS if _field(value, fields) in [f"experts.{name}.parts" for name in OF_ONE_PART] else OTHER
    return OTHER


def _counts_turns(comparison, constant, value):
    """Of an unrolled loop: what is left over, as bits of a number of turns or counted down, or whole rounds."""
    if comparison == "lt.u64":
        return constant == "3" or (constant == "4" and value.name == "and.b64" and value.operands[2] == "7")
    if comparison != "eq.s64":
        return False
    if value.name == "and.b64":
        return value.operands[2] in ("1", "3", "7")
    return value.name == "add.s64" and (constant == "1" or (constant == "0" and value.operands[2] in ("-4", "-8")))


def _is_wrapped(listing, branch, value):
    """Is it an index to which the length was added where it was negative, as Numba does for Python?"""
    parts = [_writer(listing, branch, register) for register in value.operands[1:]] if value.name == "add.s64" else []
    return any(part is not None and part.name == "and.b64" for part in parts)


def _field(load, fields):
    """Name of the field of the arguments that an instruction loads, or None."""
    match = re.fullmatch(r"\[%\w+\+(\d+)\]", load.operands[1]) if load.name.startswith("ld.global") else None
    return fields.get(int(match[1])) if match else None


def _fields_of(variant):
    return {8 * HEADER_WORDS + at: name.removeprefix("forward.") for at, name in places(like_arguments(variant))}


def _told(instructions, gap):
    lines = f"PTX lines {instructions[gap.first].line} to {instructions[gap.last].line}"
    if gap.branch < 0:
        return f"{lines}, where no branch leads"
    return f"{lines}, by line {instructions[gap.branch].line}: {instructions[gap.branch].text}"


def report(variant, text, executed):
    """(instructions, how many never ran, {reason: how many}, lines of those that nothing explains)"""
    program = load(text)
    ran = instructions_executed(program, executed)
    found = gaps(program, ran, _fields_of(variant))
    unexplained = [_told(program.listing.instructions, gap) for gap in found if gap.reason == OTHER]
    return len(ran), int((~ran).sum()), by_reason(found), unexplained
