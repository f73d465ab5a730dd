"""Activations and their slopes as verbs of kernel code: of each formula (reference/activations/), in the type of its
argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from reference.activations import ACTIVATIONS, FILES, activation, activation_slope

IS_VERB = True  # places in the source are those of callers (device/fibers.py)
IDENTITY = ACTIVATIONS.index("identity")  # it has no verb


def _make_verb(meaning: Callable[..., Any], name: str) -> Callable[[Any], Any]:
    return lambda x: meaning(name, np.asarray(x))[()]


VERBS = {name: _make_verb(activation, name) for name in FILES}
SLOPES = {name: _make_verb(activation_slope, name) for name in FILES}
BY_INDEX = tuple((ACTIVATIONS.index(name), verb) for name, verb in VERBS.items())
SLOPES_BY_INDEX = tuple((ACTIVATIONS.index(name), verb) for name, verb in SLOPES.items())
FORMULAS = tuple((verb, FILES[name].make) for name, verb in VERBS.items()) + tuple(
    (verb, FILES[name].make_slope) for name, verb in SLOPES.items()
)  # (verb, what makes its formula), to be registered
