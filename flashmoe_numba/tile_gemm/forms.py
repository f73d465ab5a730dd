"""What a tile GEMM makes of its sums: a kind of expert (reference/experts.py) as a record of numbers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from reference import ExpertKind
from reference.activations import ACTIVATIONS
from reference.layer_kinds import BOUNDS

from .activations import IDENTITY

PLAIN = 0  # an activation and nothing else, gated or not; the others are of gated experts
CLAMP, CLAMP_ACTIVATED, SOFTCAP = 1, 2, 3
_SHAPES = {"clamp": CLAMP, "clamp_activated": CLAMP_ACTIVATED, "softcap": SOFTCAP}


class Form(NamedTuple):
    """`ExpertKind` without its norm. The numbers that are not integers have the type of sums."""

    activation: int  # index into ACTIVATIONS
    shape: int  # PLAIN, or how g and u are bound
    gate_limit: Any  # infinite where there is none
    up_limit: Any
    slope: Any
    up_offset: Any


def make_form(kind: ExpertKind, accumulator: np.dtype[Any]) -> Form:
    number = accumulator.type
    is_plain = kind.bound == "none" and kind.slope == 1 and kind.up_offset == 0
    gate_limit, up_limit = (math.inf if limit is None else limit for limit in (kind.gate_limit, kind.up_limit))
    shape = PLAIN if is_plain else _SHAPES.get(kind.bound, CLAMP)  # to infinity, which does nothing
    numbers = map(number, (gate_limit, up_limit, kind.slope, kind.up_offset))
    return Form(kind.activation_idx, shape, *numbers)


def linear_form(accumulator: np.dtype[Any]) -> Form:
    """Sums stay as they are."""
    return make_form(ExpertKind(activation=ACTIVATIONS[IDENTITY], gated=False), accumulator)


def kind_of(form: Form, gated: bool) -> ExpertKind:
    """The other way, for the interpreted meaning."""
    activation = ACTIVATIONS[form.activation]
    if form.shape == PLAIN:
        return ExpertKind(activation=activation, gated=gated)
    bound = {shape: name for name, shape in _SHAPES.items()}[form.shape]
    assert gated and bound in BOUNDS
    gate_limit, up_limit = (None if math.isinf(limit) else float(limit) for limit in (form.gate_limit, form.up_limit))
    return ExpertKind(
        activation=activation,
        gated=True,
        bound=bound,
        gate_limit=gate_limit,
        up_limit=up_limit,
        slope=float(form.slope),
        up_offset=float(form.up_offset),
    )


# Of one number, for any target: whoever compiles them puts them through `jit`.


def at_most(x, limit):
    """min(x, limit); NaN stays."""
    return x if not x > limit else limit


def sigmoid_slope(x, one):
    """The derivative of formulas.sigmoid, without a difference that cancels."""
    power = math.exp(-abs(x))
    return power / ((one + power) * (one + power))


def within(x, limit):
    """x in [-limit, limit]; NaN stays."""
    below = x if not x > limit else limit
    return below if not below < -limit else -limit
