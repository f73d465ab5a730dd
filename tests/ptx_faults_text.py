"""Why some plants cannot show, read from the text around their line: `(lines, number, variant)` -> why, or None."""

import functools
import re

from ptx_faults_words import fields_of, origin, word_of

# What a thread may do between two barriers without the others' noticing: nothing in memory but to read its arguments
# and to make mbarriers, which nobody uses before the next barrier.
QUIET = re.compile(
    r"$|//|[{}]$|\.reg|\$?\w+:$|(@lead )?(mbarrier\.init|fence\.)|ld\.global\.u64\s|"
    r"(mov|cvt|cvta|add|sub|mul|mad|neg|not|and|or|xor|shl|shr|min|max|div|rem|setp|selp)\."
)
COUNTED = {"problem.num_topk", "problem.num_experts", "problem.experts_per_rank"}
MORE = "A fence of more lanes orders more, and changes nothing."
SMALL = "Numbers of pairs, experts and packets are below 2^32, where both divisions give the same."
NEGATIVE = "An array's size is added to an index that is negative, and there is none."
ONE_MAP = (
    "The down projection's halves are columns of one matrix: both fences are of one map, and the other one is left."
)
LANE_0 = "trace: A processor's first lane is the only one that adds to its block's word."
BEFORE_GATE = "TAIL: Before the gate is open nobody but this lane reserves places (docs/protocol.md, 5)."
FIRST = "TAIL: It is the first thing a call does, and nobody reserves places before they have these tasks."
NEXT = "Every way from it comes to another barrier before any memory that lanes share is touched."
BEFORE = (
    "The last round of the loop before it ends with a barrier, and nothing is touched since; there is a round always."
)


def one_map(lines, number, variant):
    """A fence of a tensor map of the down projection, where the other half's is fenced next to it."""
    at = [field_of(lines, k, variant) == "experts.down.maps" for k in (number - 1, number, number + 1)]
    return ONE_MAP if at[1] and (at[0] or at[2]) else None


def field_of(lines, number, variant):
    """The field of a rank's arguments that leads to the tensor map that a line fences, or None."""
    line = "".join(lines[number - 1 : number])
    match = re.search(r"fence\.proxy\.tensormap\S* \[(%\w+)\]", line)
    if not match:
        return None
    fields, _ = origin(lines, number - 2, match[1])
    return next((fields_of(variant)[at] for at in fields if at in fields_of(variant)), None)


def fence_of_more(lines, number, variant):
    return MORE if re.match(r"@lead fence\.", lines[number - 1].strip()) else None


def small_division(lines, number, variant):
    """The way around a 64-bit division of what 32 bits can say, divided by a number of experts or choices."""
    begin = "\n".join(line.strip() for line in lines[number - 4 : number])
    match = re.fullmatch(
        r"or\.b64\s+(\S+), \S+, (\S+);\nand\.b64\s+(\S+), \1, -4294967296;\n"
        r"setp\.eq\.s64\s+(\S+), \3, 0;\n@\4 bra\s+\S+;",
        begin,
    )
    if not match:
        return None
    fields, added = origin(lines, number - 5, match[2])
    divisors = {fields_of(variant).get(at) for at in fields}
    return SMALL if divisors and divisors <= COUNTED and not added else None


def size_for_negative(lines, number, variant):
    """An array's size that is added to its index where that is negative, and is not read for anything else."""
    register = re.search(r"ld\.global\.u64\s+(%\w+),", lines[number - 1])
    if not register:
        return None
    name = re.escape(register[1])
    uses = [
        k for k, line in enumerate(lines) if k != number - 1 and re.search(rf"{name}\b", line) and ".reg" not in line
    ]
    return NEGATIVE if uses and all(adds_if_negative(lines, k, name) for k in uses) else None


def adds_if_negative(lines, k, name):
    match = re.match(rf"\s*and\.b64\s+%\w+, (%\w+), {name};", lines[k])
    if not match:
        return False
    sign = rf"\s*shr\.s64\s+{re.escape(match[1])}, %\w+, 63;"
    return sum(re.match(rf"\s*\S+\s+{re.escape(match[1])},", line) is not None for line in lines) == 1 and any(
        re.match(sign, line) for line in lines[:k]
    )


def one_adds(lines, number, variant):
    """An addition to a word that no other thread adds to, ever or at that time."""
    word = word_of(lines, number, variant)
    if word == "trace" and by_lane_0(lines, number):
        return LANE_0
    if word != "TAIL":
        return None
    return (
        FIRST if at_the_beginning(lines, number) else BEFORE_GATE if before_the_gate(lines, number, variant) else None
    )


def at_the_beginning(lines, number):
    """Is a line only reached from the kernel's beginning, with no barrier, atomic access or acquire on the way?"""
    come_from, labels, ways, seen = {}, _labels(tuple(lines)), [number - 1], set()
    for k, line in enumerate(lines):
        if match := re.search(r"\bbra(?:\.uni)?\s+(\S+);", line):
            come_from.setdefault(labels[match[1]], []).append(k)
    while ways:
        k = ways.pop()
        for before in [
            *come_from.get(k, ()),
            *([k - 1] if k and not re.match(r"\s*(bra\.uni|ret)", lines[k - 1]) else []),
        ]:
            if re.match(r"\s*(bar\.sync|atom\.|ld\.acquire)", lines[before]):
                return False
            ways += [] if before in seen else [before]
            seen.add(before)
    return 0 in seen


def before_the_gate(lines, number, variant):
    """Do all ways from a line come to GATE_OPEN, before they come to a barrier or to the end?"""
    labels, ways, seen = _labels(tuple(lines)), [number], set()
    while ways:
        k = ways.pop()
        line = lines[k].strip()
        if k in seen or (
            line.startswith(("st.release", "ld.acquire")) and word_of(lines, k + 1, variant) == "GATE_OPEN"
        ):
            continue
        seen.add(k)
        jump = re.match(r"(?:@(!?\S+)\s+)?bra(?:\.uni)?\s+(\S+);", line)
        if line.startswith(("bar.sync", "ret;")):
            return False
        ways += [labels[jump[2]]] if jump else []
        ways += [] if jump and not jump[1] else [k + 1]
    return True


def by_lane_0(lines, number):
    """Does a line follow, label free, on a branch that only the first lane of a block does not take?"""
    guard = r"\s*setp\.ne\.s32\s+(%\w+), (%\w+), 0;"
    for k in range(number - 2, -1, -1):
        if ":" in lines[k] and not lines[k].startswith("//"):
            return False
        match = re.match(guard, lines[k])
        if match and re.match(rf"\s*@{match[1]} bra", lines[k + 1]):
            return any(
                re.match(rf"\s*mov\.u32 {re.escape(match[2])}, %tid\.x;", line) for line in lines[max(0, k - 4) : k]
            )
    return False


def another_barrier(lines, number, variant):
    """Every way on comes to another barrier, or the loop before it ends each round so; nothing is touched between."""
    if quiet_ways(lines, number):
        return NEXT
    before = max((k for k in barriers(lines) if k < number), default=None)
    return BEFORE if before and number in quiet_ways(lines, before) else None


@functools.cache
def _labels(lines):
    found = (re.match(r"(\$?\w+):", line) for line in lines)
    return {match[1]: k for k, match in enumerate(found) if match}


def barriers(lines):
    return [k for k, line in enumerate(lines, 1) if re.match(r"\s*bar\.sync", line)]


def quiet_ways(lines, number):
    """The barriers that ways from a barrier come to first, if all do and touch nothing on the way; else none."""
    labels, ways, seen, reached = _labels(tuple(lines)), [number], set(), set()
    true, never = settled(lines, number)
    while ways:
        k = ways.pop()
        line = lines[k].strip()
        jump = re.match(r"(?:@(!?\S+)\s+)?bra(?:\.uni)?\s+(\S+);", line)
        if k in seen:
            continue
        seen.add(k)
        if line.startswith("bar.sync"):
            reached.add(k + 1)
        elif jump:
            ways += [] if jump[1] in never or over_a_loop(lines, jump[1]) else [labels[jump[2]]]
            ways += [k + 1] if jump[1] and jump[1] not in true else []
        elif QUIET.match(line):
            ways.append(k + 1)
        elif line != "ret;":
            return set()
    return reached


def settled(lines, number):
    """Predicates that are true at a line, as they were last set before the loop that it is in; and their opposites."""
    last = {}
    for line in lines[: number - 1]:
        if match := re.match(r"\s*\w+\.pred\s+(%\w+), (.*);", line):
            last[match[1]] = match[2]
    true = {name for name, value in last.items() if value == "-1"}
    opposite = (re.match(r"\s*not\.pred\s+(%\w+), (%\w+);", line) for line in lines)
    return true, {match[1] for match in opposite if match and match[2] in true}


def over_a_loop(lines, guard):
    """Is a branch's guard that a loop has no rounds? Those between barriers are over the depth, and have some."""
    for line in _set_by(tuple(lines)).get(guard, ()):
        match = re.fullmatch(r"setp\.eq\.s64\s+%\w+, (%\w+), 0;", line)
        rounds = _set_by(tuple(lines)).get(match[1], ()) if match else ()
        if len(rounds) != 1 or not re.fullmatch(r"selp\.b64\s+%\w+, %\w+, 0, %\w+;", rounds[0]):
            return False
    return guard in _set_by(tuple(lines))


@functools.cache
def _set_by(lines):
    """The lines that set each register."""
    found = {}
    for line in lines:
        if match := re.match(
            r"\s*(?:mov|cvt|add|sub|mul|min|max|and|or|setp|selp|ld|div|rem|shl|shr)\.\S+\s+(%\w+),", line
        ):
            found.setdefault(match[1], []).append(line.strip())
    return found


BY_TEXT = {
    "a proxy fence removed": one_map,
    "a predicate removed": fence_of_more,
    "a branch inverted": small_division,
    "an offset wrong": size_for_negative,
    "a barrier removed": another_barrier,
    "an addition not atomic": one_adds,
}
