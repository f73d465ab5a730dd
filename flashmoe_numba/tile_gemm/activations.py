"""Activations as verbs of kernel code: one for each formula (reference/activations/), in the type of its argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from reference.activations import ACTIVATIONS, FILES, activation

IS_VERB = True  # places in the source are those of callers (device/fibers.py)
IDENTITY = ACTIVATIONS.index("identity")  # it has no verb


def _make_verb(name: str) -> Callable[[Any], Any]:
    return lambda x: activation(name, np.asarray(x))[()]


VERBS = {name: _make_verb(name) for name in FILES}
BY_INDEX = tuple((ACTIVATIONS.index(name), verb) for name, verb in VERBS.items())
