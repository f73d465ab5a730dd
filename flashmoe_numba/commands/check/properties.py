"""What must hold of any Mixture-of-Experts layer: each property by its name, its cases, and how it is judged.

A property takes the inputs of a case and may change them; then it makes calls and judges what came back. Results are
compared with the float64 oracle element by element (`reference/error_bounds.py`), or with each other bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np

from reference import tolerance
from reference.arrays import Array, stream
from reference.error_bounds import underflow

from . import changes
from .inputs import Case, Inputs, Kind, make_inputs
from .target import Answer, Call, TargetError, differs

# Roundings to the element type on the way, at most: gate, up, activation, their product, the expert's result, the
# routing weight, the weighted result; and one for each choice that is added. A layer that rounds less passes as well.
ROUNDINGS = 7

Run: TypeAlias = Callable[[Sequence[Call]], list[Answer]]


class Finding(NamedTuple):
    """How far off a case was, and how far it may be; `wrong` says what is wrong, and is None if nothing is.

    Units: an element's terms (`absolute_terms`) where the oracle is what it is compared with, else the largest element.
    """

    deviation: float
    tolerance: float
    wrong: str | None = None
    hung: bool = False


@dataclass(frozen=True)
class Property:
    """One thing that must hold.

    Args:
        claim: it, in words.
        judge: makes calls, and judges them.
        sizes: the nearest case that the property can be asked of.
        change: what is changed of ordinary inputs, by random numbers of the case's own.
    """

    name: str
    claim: str
    judge: Callable[[Inputs, Run], Finding]
    sizes: Callable[[Case], Case] = lambda case: case
    change: Callable[[Inputs, np.random.Generator], Inputs] = lambda inputs, _: inputs

    def inputs(self, case: Case, kind: Kind) -> Inputs:
        """What the case calls the layer with."""
        return self.change(make_inputs(case, kind), stream(case.seed, changes.CHANGE_STREAM))


# ---- judges


def equals_oracle(inputs: Inputs, run: Run, strided: bool = False) -> Finding:
    """One call with the whole batch."""
    (answer,) = run([inputs.call(strided=strided)])
    return compare(checked(answer, inputs.x), inputs, np.ones(len(inputs.x), bool))


def equals_oracle_strided(inputs: Inputs, run: Run) -> Finding:
    return equals_oracle(inputs, run, strided=True)


def keeps_nan_in_its_row(inputs: Inputs, run: Run) -> Finding:
    """Rows that are finite equal the oracle, and those with a NaN are not finite."""
    (answer,) = run([inputs.call()])
    y, clean = checked(answer, inputs.x), np.array(np.isfinite(inputs.x).all(axis=1))
    hidden = np.isnan(inputs.x).any(axis=1) & np.isfinite(y.astype(np.float64)).all(axis=1)
    if hidden.any():
        return Finding(np.inf, 0, f"row {hidden.argmax()} of x has a NaN, and y is finite there")
    return compare(y, inputs, clean)


def keeps_inputs(inputs: Inputs, run: Run) -> Finding:
    (answer,) = run([inputs.call()])
    checked(answer, inputs.x)
    if answer.changed:
        return Finding(np.inf, 0, f"the call changed {', '.join(answer.changed)} in place")
    return Finding(0, 0)


def repeats(inputs: Inputs, run: Run) -> Finding:
    """The same call again, with another one between; and once more of a layer made anew."""
    whole, between = inputs.call(), inputs.call(slice(None, None, -2))
    first, _, again = run([whole, between, whole])
    (anew,) = run([whole])
    y = checked(first, inputs.x)
    finding = same_bits(checked(again, inputs.x), y, "in the same call again")
    return finding if finding.wrong else same_bits(checked(anew, inputs.x), y, "in the same call of a layer made anew")


def is_alone_what_it_is_in_the_batch(inputs: Inputs, run: Run) -> Finding:
    """The first, the middle and the last row alone, and the first half without the rest."""
    middle = len(inputs.x) // 2
    parts = [slice(row, row + 1) for row in sorted({0, middle, len(inputs.x) - 1})] + [slice(0, middle)]
    whole, *answers = run([inputs.call(rows) for rows in [slice(None), *parts]])
    y = checked(whole, inputs.x)
    for rows, answer in zip(parts, answers, strict=True):
        where = f"row {rows.start} alone" if rows.stop == rows.start + 1 else f"rows 0 to {rows.stop - 1} alone"
        finding = same_bits(checked(answer, inputs.x[rows]), y[rows], f"with {where}")
        if finding.wrong:
            return finding
    return Finding(0, 0)


def does_not_see_the_order(inputs: Inputs, run: Run) -> Finding:
    whole, reversed_ = run([inputs.call(), inputs.call(slice(None, None, -1))])
    y = checked(whole, inputs.x)
    return same_bits(checked(reversed_, inputs.x)[::-1], y, "with the rows in reverse")


# ---- comparisons


def checked(answer: Answer, x: Array) -> Array:
    """y, if it has the shape and the type of x."""
    y = answer.y
    if y.shape != x.shape or y.dtype != x.dtype:
        raise TargetError(f"y must be {x.dtype} {list(x.shape)} as x is, got {y.dtype} {list(y.shape)}")
    return y


def compare(y: Array, inputs: Inputs, rows: Array) -> Finding:
    """These rows of y with the oracle's, `rows` being `[num_tokens]` of bool."""
    config, exact = inputs.config, inputs.expected
    limit = tolerance(config, ROUNDINGS + config.num_topk)
    terms = inputs.terms + underflow(config) / limit
    with np.errstate(invalid="ignore"):  # inf - inf
        errors = np.abs(y.astype(np.float64) - exact) / terms
    errors[np.isnan(errors)] = np.inf
    errors[~rows] = 0
    if not errors.size:
        return Finding(0, limit)
    row, column = np.unravel_index(errors.argmax(), errors.shape)
    worst = float(errors[row, column])
    if worst <= limit:
        return Finding(worst, limit)
    bound = limit * terms[row, column]
    got, wanted = float(y[row, column]), float(exact[row, column])
    return Finding(worst, limit, f"y[{row}, {column}] is {got:.9g}, and must be {wanted:.9g} +- {bound:.2g}")


def same_bits(y: Array, expected: Array, when: str) -> Finding:
    """Two results of one shape and type."""
    if not differs(y, expected):
        return Finding(0, 0)
    a, b = y.astype(np.float64), expected.astype(np.float64)
    other = np.array([differs(*pair) for pair in zip(y.ravel(), expected.ravel(), strict=True)]).reshape(y.shape)
    with np.errstate(invalid="ignore"):
        apart = np.nan_to_num(np.abs(a - b), nan=np.inf).max()
    size = np.abs(b[np.isfinite(b)]).max(initial=0)
    wrong = f"{other.sum()} of {y.size} elements have other bits {when}, at most {apart:.2g} apart"
    return Finding(float(apart / size) if size else np.inf, 0, wrong)


# ---- the properties


def _fixed(**sizes: int) -> Callable[[Case], Case]:
    return lambda case: replace(case, **sizes)


def _least_tokens(least: int) -> Callable[[Case], Case]:
    return lambda case: replace(case, num_tokens=max(least, case.num_tokens))


PROPERTIES = (
    Property("oracle", "any sizes: equals the float64 oracle", equals_oracle),
    Property("one-choice", "the same, with one expert for each token", equals_oracle, _fixed(num_topk=1)),
    Property("all-experts", "the same, with every expert for each token", equals_oracle,
             lambda case: replace(case, num_topk=case.num_experts)),
    Property("hot-experts", "the same, with all tokens at the same experts, others idle", equals_oracle,
             change=changes.to_the_same_experts),
    Property("one-token", "the same, with one token", equals_oracle, _fixed(num_tokens=1)),
    Property("no-tokens", "the same, with none", equals_oracle, _fixed(num_tokens=0)),
    Property("padding", "choices -1 and num_experts are none, whatever their weight", equals_oracle,
             change=changes.with_padding),
    Property("zero-weights", "a choice of weight 0 adds nothing", equals_oracle, change=changes.with_zero_weights),
    Property("large-values", "rows up to the range of the type, each exact for its size", equals_oracle,
             change=changes.with_large_rows),
    Property("subnormals", "rows whose results are subnormal, or hardly more", equals_oracle,
             change=changes.with_tiny_rows),
    Property("nonfinite-rows", "a NaN or inf spoils its own row only, and NaN stays visible", keeps_nan_in_its_row,
             _least_tokens(2), changes.with_nonfinite_rows),
    Property("strided", "inputs need not lie in one piece", equals_oracle_strided),
    Property("inputs-kept", "a call changes none of its arguments", keeps_inputs),
    Property("repeatable", "the same call gives the same bits", repeats),
    Property("batch", "a row has the same bits alone and beside others", is_alone_what_it_is_in_the_batch,
             _least_tokens(2)),
    Property("row-order", "a row has the same bits wherever it lies", does_not_see_the_order, _least_tokens(2)),
)  # fmt: skip
