"""docs/ptx_faults.md from the verdicts of ptx_faults.py.

python tests/ptx_faults_report.py VERDICTS DOCUMENT
"""

import functools
import sys
from collections import Counter, defaultdict
from pathlib import Path

from ptx_fault_rules import RULES, plants
from ptx_fault_runs import ALONE, FAULT, HANG, NOT_EXECUTED, SURVIVED, WRONG, text_of
from ptx_faults import read
from ptx_faults_explained import reason

EXPLAINED, UNEXPLAINED = "explained", "not explained"
COLUMNS = (FAULT, WRONG, HANG, ALONE, EXPLAINED, UNEXPLAINED, NOT_EXECUTED)
HEAD = """# Faults planted in the linked kernels

Written by `make ptx-faults`: one line of a linked kernel is changed, and the kernel runs on the PTX machine in worlds
of `tests/ptx_worlds.py` that execute that line, under several schedules. It shows as a *fault* that the machine names,
as a *result* that is wrong or has not the same bits under every schedule, or as *no end*: a deadlock, a deadline, or
too many steps. *Each block alone* counts scopes that are wide enough while the blocks of a rank share a GPU: made GPUs
of their own, they find those too. Lines that are *not executed* are a matter of `tests/ptx_worlds.py`.
"""


def outcome(verdict):
    if verdict.verdict != SURVIVED:
        return verdict.verdict
    return EXPLAINED if why(verdict.plant) else UNEXPLAINED


@functools.cache
def why(plant):
    return reason(plant, lines_of(plant.variant))


@functools.cache
def lines_of(name):
    return text_of(name).split("\n")


def table(verdicts):
    """A row for each rule."""
    yield "| rule | plants | " + " | ".join(COLUMNS) + " |"
    yield "|---|" + "---:|" * (len(COLUMNS) + 1)
    for rule in [*RULES, None]:
        counts = Counter(outcome(v) for v in verdicts if rule in (v.plant.rule, None))
        if counts.total():
            cells = [str(counts[column] or "") for column in COLUMNS]
            yield f"| {rule or 'all'} | {counts.total()} | " + " | ".join(cells) + " |"


def how_found(verdicts):
    """What the machine said, and how often."""
    counts = Counter(v.how for v in verdicts if v.verdict in (FAULT, ALONE))
    return [f"- {count} times: {how}" for how, count in counts.most_common()]


def explained(verdicts):
    """A line for each reason of a rule, and where it holds."""
    lines = defaultdict(list)
    for verdict in verdicts:
        if outcome(verdict) == EXPLAINED:
            lines[verdict.plant.rule, why(verdict.plant)].append(verdict.plant.line)
    for (rule, reason_given), numbers in sorted(lines.items()):
        yield f"- {len(numbers)} times {rule}: {reason_given} Lines {', '.join(map(str, sorted(numbers)))}."


def unexplained(verdicts):
    return [told(v.plant) for v in in_order(verdicts) if outcome(v) == UNEXPLAINED]


def contradicted(verdicts):
    """What was found, though a reason says that it cannot show: then the reason is wrong."""
    found = (v for v in in_order(verdicts) if v.verdict in (FAULT, WRONG, HANG) and why(v.plant))
    return [f"{told(v.plant)}. {v.how}; {why(v.plant)}" for v in found]


def in_order(verdicts):
    return sorted(verdicts, key=lambda v: (v.plant.rule, v.plant.line))


def told(plant):
    what = f" ({plant.what})" if plant.what else ""
    return f"- line {plant.line}, {plant.rule}{what}: `{plant.was}`"


SECTIONS = {
    "What the machine named": how_found,
    "Cannot show": explained,
    "Survived, not explained": unexplained,
    "Found, though a reason says that it cannot show": contradicted,
}


def document(verdicts):
    parts = [HEAD]
    for name in sorted({v.plant.variant for v in verdicts}):
        own = [v for v in verdicts if v.plant.variant == name]
        num_plants = len(list(plants(name, text_of(name))))
        parts += [f"\n## {name}\n", f"{len(own)} of {num_plants} plants judged.\n", *table(own)]
        for title, section in SECTIONS.items():
            lines = list(section(own))
            parts += [f"\n{title}:\n", *lines] if lines else []
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(document(read(Path(sys.argv[1]))), encoding="utf-8")
