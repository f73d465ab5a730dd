"""What fits say of rows that they never saw: one (source, model) after the other is left out, and simulated.

The numbers of its policy are fitted to all its other rows. Where none of them is on the same GPU, the GPU's numbers are
carried over from the policy's other GPUs (`drafting/rates.py`), and without these they are the defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..drafting import trust
from ..drafting.rates import Values, donors_of, fitted_values
from ..drafting.trust import RANGES, token_range
from .cases import Case
from .compare import Result, mean_error
from .fit import Key, fit_values, fitted_cases, others
from .written import table, write_lines

HEADER = """\
# Mean relative errors, without their signs, of measurements that the fits of a policy never saw, by tokens per rank.
# Written by `flashmoe validate --folds`, see trust.py; beside each: the rows and their mean.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """One (source, model) of one policy on one GPU.

    Args:
        values: of the fitted knobs, from the other rows.
        donors: the GPUs that the values are from; none: they are the defaults, or fitted to rows of the same GPU.
        seen: rows of the same GPU that the values were fitted to.
        results: the rows left out, simulated with these values.
        in_sample: the same with the values fitted to all rows.
    """

    policy: str
    gpu: str
    source: str
    model: str
    values: Values
    donors: tuple[str, ...]
    seen: int
    results: tuple[Result, ...]
    in_sample: tuple[Result, ...]


def leave_out(cases: Iterable[Case]) -> list[Fold]:
    """All folds, by policy, GPU, source and model."""
    groups = fitted_cases(cases)
    whole = fit_values(groups)
    folds: dict[tuple[Key, tuple[str, str]], list[Case]] = {}
    for key, group in sorted(groups.items()):
        for case in group:
            folds.setdefault((key, case.fold), []).append(case)
    return [_fold(key, name, left_out, groups, whole[key]) for (key, name), left_out in folds.items()]


def _fold(
    key: Key, name: tuple[str, str], left_out: Sequence[Case], groups: Mapping[Key, Sequence[Case]], whole: Values
) -> Fold:
    policy, gpu = key
    rest = {
        of: [case for case in group if case.fold != name]
        for of, group in groups.items()
        if of[0] == policy and any(case.fold != name for case in group)
    }
    fitted = fit_values(rest)
    known = others(fitted, key)
    values = fitted.get(key) or fitted_values(policy, gpu, known)
    return Fold(
        policy=policy,
        gpu=gpu,
        source=name[0],
        model=name[1],
        values=values,
        donors=() if key in fitted else tuple(donors_of(gpu, known[policy])),
        seen=len(rest.get(key, ())),
        results=_results(left_out, values),
        in_sample=_results(left_out, whole),
    )


def _results(cases: Sequence[Case], values: Values) -> tuple[Result, ...]:
    return tuple(Result(case=case, simulated=case.simulated(values)) for case in cases)


def errors_by_range(results: Sequence[Result]) -> dict[str, float]:
    """The mean error in each range of tokens that has rows."""
    by_range: dict[str, list[Result]] = {}
    for result in results:
        by_range.setdefault(token_range(result.case.world.config.num_tokens), []).append(result)
    return {name: mean_error(by_range[name]) for name in RANGES if name in by_range}


def by_gpu(folds: Iterable[Fold]) -> dict[Key, list[Fold]]:
    """The folds of each policy on each GPU."""
    groups: dict[Key, list[Fold]] = {}
    for fold in folds:
        groups.setdefault((fold.policy, fold.gpu), []).append(fold)
    return groups


def write_trust(folds: Iterable[Fold]) -> None:
    """The left-out errors into the file that `sim.drafting.trust` reads."""
    lines = {}
    for (policy, gpu), group in by_gpu(folds).items():
        results = [result for fold in group for result in fold.results]
        errors = {f'"{name}"': round(error, 3) for name, error in errors_by_range(results).items()}
        lines[policy, gpu] = f"{gpu} = {table(errors)} # {len(results)} rows, {mean_error(results):.1%}\n"
    write_lines(trust.FILE, HEADER, lines)
    trust.left_out_errors.cache_clear()
