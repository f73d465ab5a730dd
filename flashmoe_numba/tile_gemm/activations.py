"""Activation kinds as kernel code knows them, indices into `reference.ACTIVATIONS`, and the two with a formula."""

from __future__ import annotations

import numpy as np

from reference.experts import activation
from reference.layer_kinds import ACTIVATIONS

IDENTITY, RELU, GELU, SILU = (ACTIVATIONS.index(name) for name in ("identity", "relu", "gelu", "silu"))
IS_VERB = True  # places in the source are those of callers (device/fibers.py)


def silu(x):
    """x / (1 + exp(-x)) in the type of x."""
    return activation("silu", np.asarray(x))[()]


def gelu(x):
    """x (1 + erf(x / sqrt 2)) / 2 in the type of x."""
    return activation("gelu", np.asarray(x))[()]
