"""Cases of each property, and the first that fails made small: deterministic, all by one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from reference import Weights
from reference.arrays import stream

from .inputs import Case, Inputs, Kind, draw_case
from .properties import Finding, Property
from .subject import TimeLimit
from .target import Answer, Call, TargetError

MOST_SHRINKS = 150  # cases that may be tried to make one smaller

Runner: TypeAlias = Callable[[Weights, Sequence[Call]], list[Answer]]


@dataclass
class Result:
    """What became of one property; `case` is the smallest that failed, `worst` its finding or the worst there was."""

    asked: Property
    cases: int = 0
    worst: Finding = field(default_factory=lambda: Finding(0, 0))
    case: Case | None = None
    ended: bool = False

    @property
    def verdict(self) -> str:
        if self.case is not None:
            return "FAILS"
        return "holds" if self.ended else "interrupted"


def look(result: Result, kind: Kind, run: Runner, examples: int, seed: int) -> None:
    """Try so many cases, or until one fails, which is made small. Ctrl-C leaves in `result` what is known by then."""
    rng = stream(seed, *result.asked.name.encode())
    for _ in range(examples):
        case = result.asked.sizes(draw_case(rng, kind))
        finding = judge(result.asked, result.asked.inputs(case, kind), run)
        result.cases += 1
        if finding.wrong:
            result.case, result.worst = case, finding
            _shrink(result, kind, run)
            break
        result.worst = max(result.worst, finding, key=_share)
    result.ended = True


def judge(asked: Property, inputs: Inputs, run: Runner) -> Finding:
    """Whatever goes wrong in the target is a finding, too."""
    try:
        return asked.judge(inputs, lambda calls: run(inputs.weights, calls))
    except TargetError as error:
        return Finding(float("inf"), 0, str(error), hung=isinstance(error, TimeLimit))


def _share(finding: Finding) -> float:
    return finding.deviation / finding.tolerance if finding.tolerance else 0


def _shrink(result: Result, kind: Kind, run: Runner) -> None:
    """Replace the case by smaller ones that fail, as long as there are any. One that hangs is left as it is."""
    assert result.case is not None
    tried = {result.case}
    candidates = _smaller(result.case, result.asked, kind)
    while not result.worst.hung and len(tried) <= MOST_SHRINKS:
        case = next((case for case in candidates if case not in tried), None)
        if case is None:
            return
        tried.add(case)
        finding = judge(result.asked, result.asked.inputs(case, kind), run)
        if finding.wrong:
            result.case, result.worst = case, finding
            candidates = _smaller(case, result.asked, kind)


def _smaller(case: Case, asked: Property, kind: Kind) -> Iterator[Case]:
    """Each size at its least, at half, and one less, the others as they are; only what the property can be asked of."""
    for name in ("num_tokens", "num_experts", "num_topk", "hidden", "ffn"):
        unit = kind.multiple if name in ("hidden", "ffn") else 1
        units = getattr(case, name) // unit
        for less in dict.fromkeys((1, units // 2, units - 1)):
            if 1 <= less < units:
                smaller = replace(case, **{name: less * unit})
                yield asked.sizes(replace(smaller, num_topk=min(smaller.num_topk, smaller.num_experts)))
