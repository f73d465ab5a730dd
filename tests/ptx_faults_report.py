"""docs/ptx_faults.md from the verdicts of ptx_faults.py.

python tests/ptx_faults_report.py VERDICTS DOCUMENT
"""

import functools
import sys
from collections import Counter
from pathlib import Path

from ptx_faults import ALONE, FAULT, HANG, NOT_EXECUTED, RULES, SURVIVED, WRONG, plants, read, text_of
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


def survivors(verdicts, wanted):
    lines = sorted((v.plant for v in verdicts if outcome(v) == wanted), key=lambda p: (p.rule, p.line))
    for plant in lines:
        what = f" ({plant.what})" if plant.what else ""
        yield f"- line {plant.line}, {plant.rule}{what}: `{plant.was}`. {why(plant) or ''}".rstrip()


def document(verdicts):
    parts = [HEAD]
    for name in sorted({v.plant.variant for v in verdicts}):
        own = [v for v in verdicts if v.plant.variant == name]
        num_plants = len(list(plants(name, text_of(name))))
        parts += [
            f"\n## {name}\n",
            f"{len(own)} of {num_plants} plants judged.\n",
            *table(own),
            "\nWhat the machine named:\n",
            *how_found(own),
        ]
        for wanted, title in ((EXPLAINED, "Cannot show"), (UNEXPLAINED, "Survived, not explained")):
            lines = list(survivors(own, wanted))
            parts += [f"\n{title}:\n", *lines] if lines else []
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(document(read(Path(sys.argv[1]))), encoding="utf-8")
