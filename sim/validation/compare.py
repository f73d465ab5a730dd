"""Cases run and put into groups: one policy on one GPU kind against one source, and how far off it is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..drafting.rates import Values
from .cases import IMPOSSIBLE, Case, Reason
from .tables import Row

ValuesOf = Mapping[tuple[str, str], Values]  # the fitted knobs, by policy and GPU kind


class GroupKey(NamedTuple):
    policy: str
    gpu: str
    source: str
    system: str
    quantity: str
    unit: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """A case and what its simulation gave, in the unit of its quantity."""

    case: Case
    simulated: float

    @property
    def error(self) -> float:
        """Relative: 0.1 is a tenth too much."""
        return self.simulated / self.case.measured - 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Results of one policy, GPU kind, source, system and quantity, in the order of their rows."""

    key: GroupKey
    results: tuple[Result, ...]

    @property
    def mean_error(self) -> float:
        """Mean of the relative errors without their signs."""
        return mean_error(self.results)

    @property
    def worst(self) -> Result:
        return max(self.results, key=lambda result: abs(result.error))


def compare(cases: Iterable[Case], values: ValuesOf | None = None) -> tuple[list[Group], list[tuple[Row, Reason]]]:
    """Run all cases, with these values where given and the fitted ones elsewhere, and group them.

    Comes with the rows whose worlds break a rule of their policy.
    """
    groups: dict[GroupKey, list[Result]] = {}
    refused = []
    for case in cases:
        try:
            result = Result(case=case, simulated=case.simulated((values or {}).get(case.rate_key)))
        except ValueError as error:
            refused.append((case.row, Reason(IMPOSSIBLE, str(error))))
            continue
        groups.setdefault(_key(case), []).append(result)
    return [Group(key=key, results=tuple(results)) for key, results in groups.items()], refused


def mean_error(results: Iterable[Result]) -> float:
    errors = [abs(result.error) for result in results]
    return sum(errors) / len(errors)


def _key(case: Case) -> GroupKey:
    policy, gpu = case.rate_key
    measure = case.rule.measure
    return GroupKey(policy, gpu, case.row.source, case.row.system, measure.name, measure.unit)
